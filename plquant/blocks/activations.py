"""What a block is fitted to: its inputs and the outputs it should give."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset


class Activations:
    """Batches of (input under quantization, full-precision target [, augmented target]).

    Args:
        tensors: Each [N, T, H], on the CPU.
        batch_size: Sequences per step.
        seed: Of the order of the samples; its generator is private, so that nothing else changes with it.
    """

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int, seed: int) -> None:
        self.dataset = TensorDataset(*tensors)
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def shuffled(self) -> DataLoader:
        """All samples, in a new order each time."""
        return self._loader(RandomSampler(self.dataset, generator=self._generator))

    def in_order(self) -> DataLoader:
        """All samples, in order."""
        return self._loader(SequentialSampler(self.dataset))

    def _loader(self, sampler: RandomSampler | SequentialSampler) -> DataLoader:
        # Whole batches are indexed at once: no sample by sample collation.
        batches = BatchSampler(sampler, self.batch_size, drop_last=False)
        return DataLoader(self.dataset, sampler=batches, batch_size=None)
