"""QLLM's channel reassembly (arXiv 2310.08041) as data: the channels that a linear reads, one by one.

An outlier channel c is *split* into T_c copies of x_c / T_c; to keep the width, as many ordinary channels go: *merged*
with a similar one into their mean, or *dropped*. Whatever the mixture, the map is

    x'_k = sum over c in G_k of a_c x_c        W'_k = sum over c in G_k of W_c

with ONE coefficient a_c per original channel: 1/T_c if split, 1/|G| if merged, else 1. So the source takes up all of
the multiplications, and what is left at run time is to gather K' channels and to add the few that were merged.

The released code rebuilds the matching when it applies it and merges other pairs than those it evaluated. Here a plan
is an object: the one that is evaluated is the one that is applied.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Letters: K original channels, K' channels at run time, A additions.


@dataclass(frozen=True, eq=False)
class ReassemblyPlan:
    """What every channel at run time is made of; all else follows.

    All tensors are on the CPU, whatever the default device is; what runs moves with its module.

    Attributes:
        channels: Number of original channels, K.
        index: int64 [K'], ascending: the original channel that is read. Copies of a split channel lie side by side.
        adds: int64 [A, 2]: an original channel that is merged, and the position in ``index`` it is added at.
    """

    channels: int
    index: Tensor
    adds: Tensor

    def __post_init__(self) -> None:
        merged, positions = self.adds.unbind(1)
        assert bool((self.index.diff() >= 0).all()), "index is not ascending"
        assert len(torch.cat([self.index.unique(), merged]).unique()) == len(self.index.unique()) + len(merged), (
            "a channel is merged twice, or is merged and read as well"
        )
        assert bool((self.copies[self.index[positions]] == 1).all()), "a split channel takes part in a merge"

    @classmethod
    def identity(cls, channels: int) -> ReassemblyPlan:
        """The plan that changes nothing."""
        return cls(channels, torch.arange(channels, device="cpu"), torch.empty(0, 2, dtype=torch.int64, device="cpu"))

    @classmethod
    def build(
        cls, channels: int, splits: Tensor, drops: Tensor | None = None, merges: Tensor | None = None
    ) -> ReassemblyPlan:
        """A plan from single steps; any first part of them gives a plan too. Width: K + splits - drops - merges.

        Args:
            channels: K.
            splits: int64 [E]: channels that get one more copy each (``split_order``).
            drops: int64 [D]: channels that nobody reads any more (``drop_order``).
            merges: int64 [A, 2]: a channel, and the one it is merged into, which itself stays (``merge_order``).
        """
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        drops = none if drops is None else drops
        merges = none.view(0, 2) if merges is None else merges
        copies = 1 + splits.bincount(minlength=channels)
        gone = torch.cat([drops, merges[:, 0]])
        assert bool((copies[gone] == 1).all()), "a split channel is dropped or merged"
        copies[gone] = 0
        index = torch.arange(channels, device="cpu").repeat_interleave(copies)
        adds = torch.stack([merges[:, 0], torch.searchsorted(index, merges[:, 1].contiguous())], dim=1)
        assert torch.equal(index[adds[:, 1]], merges[:, 1]), "a channel is merged into one that does not stay"
        return cls(channels, index, adds)

    @property
    def width(self) -> int:
        """Channels at run time, K'."""
        return len(self.index)

    @property
    def extra(self) -> int:
        """Copies beyond the first of every channel, sum of T_c - 1."""
        return self.width - len(self.index.unique())

    @property
    def is_identity(self) -> bool:
        """Nothing is split, dropped or merged."""
        return torch.equal(self.index, torch.arange(self.channels, device="cpu"))

    @cached_property
    def copies(self) -> Tensor:
        """T_c: how many channels at run time start from each original one, int64 [K]; 0 if it is merged or dropped."""
        return self.index.bincount(minlength=self.channels)

    @cached_property
    def coefficient(self) -> Tensor:
        """a_c, what the source multiplies each original channel by, fp64 [K]; 1 for one that is dropped."""
        merged, positions = self.adds.unbind(1)
        members = 1 + positions.bincount(minlength=self.width)
        divisor = torch.ones(self.channels, dtype=torch.int64, device="cpu")
        divisor[self.index] = self.copies[self.index] * members
        divisor[merged] = members[positions]
        return 1 / divisor.double()

    @property
    def offset(self) -> Tensor:
        """What is added to x' / scale before it is rounded, so that copies do not share one error; fp32 [K'], codes.

            o_t = (2t - T + 1) / 2T  for copy t of T        sum_t round(y + o_t) = round(T y)

        (Hermite's identity, sum_t floor(y + t/T) = floor(T y).) T equal codes have T times the rounding error of one;
        these add up to the code that the whole channel has at the full scale, as long as none is clipped. Nothing is
        subtracted again: the offsets of a channel add up to 0.
        """
        copy = torch.arange(self.width, device="cpu") - torch.searchsorted(self.index, self.index)
        copies = self.copies[self.index]
        return ((2 * copy - copies + 1).double() / (2 * copies)).float()


def split_order(abs_max: Tensor, count: int) -> Tensor:
    """Which channel gets the next copy, ``count`` times, int64 [count].

    Always the one whose copies are greatest, m_c / T_c. The first e steps are QLLM's T_c = max(1, ceil(m_c / theta))
    for the thresholds theta that ask for e copies, without a search for theta, and exactly e where maxima are equal.

    Args:
        abs_max: Greatest magnitude of every channel, m, [K], on calibration text.
        count: Copies to give.
    """
    maxima = abs_max.double().tolist()
    heap = [(-m, 1, channel) for channel, m in enumerate(maxima)]
    heapq.heapify(heap)
    order = []
    for _ in range(count):
        _, copies, channel = heap[0]
        order.append(channel)
        heapq.heapreplace(heap, (-maxima[channel] / (copies + 1), copies + 1, channel))
    return torch.tensor(order, dtype=torch.int64, device="cpu")
