"""What a block is fitted to: its inputs and the outputs it should give."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

TOKENS_AT_ONCE = 2048  # of a forward pass without gradients; quantizing a weight then costs little beside using it


def at_once(x: Tensor) -> int:
    """Sequences of one forward pass without gradients, of ``x`` [N, T, H]."""
    return max(1, TOKENS_AT_ONCE // x.shape[1])


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

    def at_once(self) -> Iterator[tuple[Tensor, ...]]:
        """All samples, in order, in batches for forward passes without gradients."""
        tensors = self.dataset.tensors
        return zip(*(t.split(at_once(t)) for t in tensors), strict=True)

    def inputs(self) -> Iterator[Tensor]:
        """The inputs alone, in such batches."""
        return (x for x, *_ in self.at_once())

    def _loader(self, sampler: RandomSampler | SequentialSampler) -> DataLoader:
        # Whole batches are indexed at once: no sample by sample collation.
        batches = BatchSampler(sampler, self.batch_size, drop_last=False)
        return DataLoader(self.dataset, sampler=batches, batch_size=None)
