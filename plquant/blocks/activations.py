"""What a block is fitted to: its inputs and the outputs it should give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler, TensorDataset

from plquant.blocks.stream_files import pieces, release

TOKENS_AT_ONCE = 2048  # of a forward pass without gradients; quantizing a weight then costs little beside using it


def at_once(x: Tensor) -> int:
    """Sequences of one forward pass without gradients, of ``x`` [N, T, H]."""
    return max(1, TOKENS_AT_ONCE // x.shape[1])


class Order(Sampler[list[int]]):
    """The numbers of a process's samples in a new random order each time, batch by batch.

    Every place of a batch draws from samples of its own, shuffled: those whose number in the whole, divided by the
    samples of a step, leaves the same remainder. So two processes with batches of one take the steps that one process
    with batches of two takes. Whole batches are indexed at once: no sample by sample collation.

    Args:
        samples: How many this process has: those of the whole whose number, divided by ``ranks``, leaves ``rank``.
        batch_size: Of them in a batch; the last one may have less.
        seed: Of the order; the generator is private, so that nothing else changes with it.
        rank: The process.
        ranks: How many there are.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._samples, self._batch_size, self._rank, self._ranks = samples, batch_size, rank, ranks
        self._began = self._generator.get_state()
        self._skipped = 0

    def __iter__(self) -> Iterator[list[int]]:
        self._began = self._generator.get_state()
        skipped, self._skipped = self._skipped, 0
        return itertools.islice(self._batches(), skipped, None)

    def _batches(self) -> Iterator[list[int]]:
        at_a_step, whole = self._batch_size * self._ranks, self._samples * self._ranks
        lengths = [len(range(place, whole, at_a_step)) for place in range(min(at_a_step, whole))]
        # Drawn for the places of all processes, so that the generator is the same in each.
        orders = [list(RandomSampler(range(length), generator=self._generator)) for length in lengths]
        for step, _ in enumerate(orders[0]):
            own = enumerate(orders[self._rank :: self._ranks])
            yield [order[step] * self._batch_size + place for place, order in own if step < len(order)]

    def __len__(self) -> int:
        return -(-self._samples // self._batch_size)

    def state(self) -> Tensor:
        """Of the generator when the pass that is under way began, uint8."""
        return self._began

    def go_on(self, state: Tensor, batches: int) -> None:
        """Let the next pass be the one that began with this state, after so many of its batches."""
        self._generator.set_state(state)
        self._skipped = batches


class _Samples(TensorDataset):
    """Of which no more than the samples asked for stay in memory, where the tensors are in files."""

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        found = super().__getitem__(index)
        for tensor in self.tensors:
            release(tensor)
        return found


class Activations:
    """Batches of (input under quantization, full-precision target [, augmented target]).

    Args:
        tensors: Each [N, T, H], on the CPU, in memory or in files: the process's own samples.
        batch_size: Sequences per step and process.
        seed: Of the order of the samples.
        rank: The process.
        ranks: How many there are.
    """

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.dataset = _Samples(*tensors)
        self.batch_size, self.ranks = batch_size, ranks
        self.numbers = range(rank, len(self.dataset) * ranks, ranks)  # of its samples in the whole
        self.order = Order(len(self.dataset), batch_size, seed, rank, ranks)

    def shuffled(self) -> DataLoader:
        """All samples, in a new order each time."""
        return DataLoader(self.dataset, sampler=self.order, batch_size=None)

    def in_order(self) -> DataLoader:
        """All samples, in order."""
        batches = BatchSampler(SequentialSampler(self.dataset), self.batch_size, drop_last=False)
        return DataLoader(self.dataset, sampler=batches, batch_size=None)

    def at_once(self) -> Iterator[tuple[Tensor, ...]]:
        """All samples, in order, in batches for forward passes without gradients."""
        tensors = self.dataset.tensors
        return zip(*(pieces(t, at_once(t)) for t in tensors), strict=True)

    def inputs(self) -> Iterator[Tensor]:
        """The inputs alone, in such batches."""
        return (x for x, *_ in self.at_once())
