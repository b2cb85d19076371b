"""The grids of integers that weights and activations are rounded to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

AUTO_GROUP_SIZES = (128, 64, 32)
MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class IntGrid:
    """Uniform integer grid: codes of ``bits`` bits, a scale (and zero-point) per group.

    Args:
        bits: Width of a code, 2 to 8.
        group_size: Weights that share one scale. ``auto`` is the largest of 128, 64, 32 which divides every width
            of the model; ``null`` is one scale for a whole output channel.
        symmetric: No zero-point: the grid is centred on zero.
        axis: What a group runs along. ``in``: input channels of one output channel, the usual choice. ``out``:
            output channels of one input channel (AdaDim's per-input-channel groups).
    """

    bits: int = 4
    group_size: int | Literal["auto"] | None = "auto"
    symmetric: bool = False
    axis: Literal["in", "out"] = "in"

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"--model.weights.bits={self.bits} is not a width we have; choose 2 to 8")
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise ValueError(
                f"--model.weights.group_size={self.group_size} is not a number of weights; "
                "choose 128, 64 or 32, auto, or null for one scale per output channel"
            )
        if self.axis == "out" and self.group_size is None:
            raise ValueError(
                "--model.weights.axis=out needs groups, but --model.weights.group_size is null; "
                "choose 128, 64 or 32, or auto"
            )

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return self.qmin + (1 << self.bits) - 1

    def grouped_width(self, shape: Iterable[int]) -> int:
        """Length of the axis of a weight of this shape, [O, I], that is cut into groups."""
        out_features, in_features = shape
        return in_features if self.axis == "in" else out_features

    def size(self, width: int) -> int:
        """Weights per group on an axis of this width; ``group_size`` must be settled."""
        assert self.group_size != "auto", "resolve() settles it"
        return width if self.group_size is None else self.group_size

    def resolve(self, shapes: dict[str, tuple[int, int]]) -> IntGrid:
        """This grid with its group size settled for a model whose linears have these shapes.

        Args:
            shapes: Name of a linear -> [O, I].

        Raises:
            ValueError: The group size does not divide a width. All such linears are named, with the divisors that do.
        """
        widths = {name: self.grouped_width(shape) for name, shape in shapes.items()}
        if self.group_size is None:
            return self
        if self.group_size == "auto":
            fits = [size for size in AUTO_GROUP_SIZES if all(width % size == 0 for width in widths.values())]
            if fits:
                return replace(self, group_size=fits[0])
        size = AUTO_GROUP_SIZES[-1] if self.group_size == "auto" else self.group_size
        bad = {name: width for name, width in widths.items() if width % size}
        if not bad:
            return self
        raise ValueError(_indivisible(self, bad, len(widths), _common_divisors(widths.values())))


@dataclass(frozen=True)
class ActivationGrid:
    """Uniform integer grids of activations; each token gets its scale (and zero-point) from its own range, at run time.

    Args:
        bits: Width of the inputs of every quantized linear and of the queries, 2 to 8; ``null`` leaves them in
            floating point.
        kv: Width of keys and values, hence of the KV cache, 2 to 8; ``same`` is that of ``bits``, ``null`` leaves them
            in floating point.
        probabilities: Width of the softmax output of attention, 2 to 8; ``null`` leaves it in floating point.
        symmetric: No zero-point: the grids are centred on zero. The softmax output, never negative, keeps its own.
    """

    bits: int | None = 4
    kv: int | Literal["same"] | None = "same"
    probabilities: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("kv", self.kv), ("probabilities", self.probabilities)):
            if isinstance(bits, int) and not MIN_BITS <= bits <= MAX_BITS:
                raise ValueError(
                    f"--model.activations.{name}={bits} is not a width we have; choose 2 to 8, or null for floating "
                    "point"
                )
        if self.bits is None and not self.in_attention:
            raise ValueError(
                "--model.activations.bits=null with nothing else set quantizes no activation; set bits, kv or "
                "probabilities, or leave out --model.activations"
            )

    @property
    def kv_bits(self) -> int | None:
        """Width of keys and values."""
        return self.bits if self.kv == "same" else self.kv

    @property
    def in_attention(self) -> bool:
        """Something inside of attention is quantized: queries, keys and values, or probabilities."""
        return any(bits is not None for bits in (self.bits, self.kv_bits, self.probabilities))

    @property
    def title(self) -> str:
        """In the words of papers, to be put after ``W4``: ``A4``, ``A8KV4``, ``A16KV4``, ``A4P8``."""
        kv = "" if self.kv_bits == self.bits else f"KV{self.kv_bits or 16}"
        return f"A{self.bits or 16}{kv}" + (f"P{self.probabilities}" if self.probabilities else "")

    def describe(self) -> list[tuple[str, str]]:
        """What is quantized where: a place, and its grid."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        rows: list[tuple[str, int | None, str]] = [
            ("inputs of the quantized linears", self.bits, f"per token, {kind}"),
            ("queries (after RoPE)", self.bits, f"per token and head, {kind}"),
            ("keys (after RoPE) and values: the KV cache", self.kv_bits, f"per token and head, {kind}"),
            ("softmax probabilities", self.probabilities, "per query token and head, from zero"),
        ]
        return [
            (place, "floating point" if bits is None else f"{bits} bits {how}, dynamic") for place, bits, how in rows
        ]


def _common_divisors(widths: Iterable[int]) -> list[int]:
    """Group sizes from 256 down to 8 which divide every width."""
    divisor = math.gcd(*widths)
    return [size for size in range(min(divisor, 256), 7, -1) if divisor % size == 0]


def _indivisible(grid: IntGrid, bad: dict[str, int], total: int, divisors: list[int]) -> str:
    """The message for widths that the group size does not divide: every offender, then what would do."""
    rows: dict[tuple[str, int], int] = {}
    for name, width in bad.items():
        key = re.sub(r"\.\d+\.", ".*.", name), width
        rows[key] = rows.get(key, 0) + 1
    what = "in_features" if grid.axis == "in" else "out_features"
    lines = "\n".join(f"  {name}  {what}={width}  ({count} of them)" for (name, width), count in rows.items())
    choices = ", ".join(map(str, divisors)) or "none from 8 to 256"
    return (
        f"--model.weights.group_size={grid.group_size} does not divide the width of {len(bad)} of {total} "
        f"linear layers:\n{lines}\n"
        f"A group size which divides every width: {choices}; or null for one scale per output channel."
    )
