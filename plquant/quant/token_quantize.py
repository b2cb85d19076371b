"""Quantize activations token by token, with the range that each token has at that moment.

A row is a token's channels (or those of one of its heads). Its range includes zero, its zero-point fits its bits, the
arithmetic is fp32 whatever the dtype of ``x``: in bf16 the quotient ``x / s`` alone is off by a level at 8 bits. On a
CPU the work is that of quantize.cpp, elsewhere and in fp64 that of the operations below; codes and scales agree to the
bit.

Letters: K channels of a row, R rows, s scale, z zero-point, Q = 2^b - 1, o offset, u = x / s,
n = clamp(round(u + o), qmin - z, qmax - z).

Gradients are straight-through and go on through the scale into the row's least and greatest element, as they do for
weights: without it nothing tells a transform that a smaller outlier gives all other channels a finer step.

    d(n s)/dx = 1    d(n s)/ds = n - u    (clipped by ``clip``: 0, n - lo / s, and d(n s)/dlo = 1; symmetric 0, n)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plquant.quant import native
from plquant.quant.affine import choose_qparams
from plquant.quant.fake_quantize import Clip
from plquant.quant.grid import IntGrid
from plquant.quant.pieces import piece_size


@dataclass(frozen=True)
class TokenCodes:
    """Quantized activations, as an integer kernel takes them.

    Attributes:
        codes: uint8 (asymmetric) or int8 (symmetric) [..., K].
        scale: fp32 [..., 1].
        zero_point: uint8 [..., 1]; ``None`` when symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The activations the codes stand for, [..., K]: ``(code - zero_point) * scale``."""
        steps = self.codes.to(self.scale.dtype)
        return (steps if self.zero_point is None else steps - self.zero_point).mul(self.scale).to(dtype)


class _Range(NamedTuple):
    """Of some rows, each [r, 1]."""

    lo: Tensor
    hi: Tensor
    scale: Tensor
    zero_point: Tensor


def _choose(low: Tensor, high: Tensor, clip: Clip | None, grid: IntGrid) -> _Range:
    """Scale and zero-point of rows whose least and greatest elements are given, [r, 1]."""
    lo, hi = low.clamp(max=0), high.clamp(min=0)
    if clip is not None:
        lo, hi = lo * clip[0], hi * clip[1]
    return _Range(lo, hi, *choose_qparams(lo, hi, grid, lo.dtype))


def _pieces(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows to work on at once, as they are and in fp32 (fp64 for fp64)."""
    step = max(1, piece_size(rows) // rows.shape[1])
    for start in range(0, max(len(rows), 1), step):  # one empty piece of no rows
        piece = slice(start, start + step)
        yield piece, rows[piece].to(torch.promote_types(rows.dtype, torch.float32))


def _clamped(rounded: Tensor, zero_point: Tensor, grid: IntGrid, out: Tensor | None = None) -> Tensor:
    """Codes less their zero-point: n of round(u + o)."""
    steps = torch.maximum(rounded, grid.qmin - zero_point, out=out)  # quicker than a clamp with tensor bounds
    return torch.minimum(steps, grid.qmax - zero_point, out=steps)


def _quantize(
    rows: Tensor, offset: Tensor | None, low: Tensor | None, high: Tensor | None, grid: IntGrid, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill ``out`` with values or codes, the single place where they are made; scale and zero-point, each [R, 1]."""
    if native.takes_rows(rows, (offset, low, high), out):
        return native.quantize_rows(rows, offset, low, high, grid, out)
    kept = []
    for piece, x in _pieces(rows):
        found = _choose(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), _pair(low, high), grid)
        rounded = x / found.scale if offset is None else (x / found.scale).add_(offset)
        steps = _clamped(rounded.round_(), found.zero_point, grid, out=rounded)
        out[piece] = steps.mul_(found.scale) if out.is_floating_point() else steps.add_(found.zero_point)
        kept.append((found.scale, found.zero_point))
    scale, zero_point = zip(*kept, strict=True)
    return torch.cat(scale), torch.cat(zero_point)


def _gradients(
    rows: Tensor, offset: Tensor | None, low: Tensor | None, high: Tensor | None, grid: IntGrid, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of the rows and of the two shares."""
    if native.takes_rows(rows, (offset, low, high), grad):
        return native.row_gradients(rows, offset, low, high, grid, grad)
    clip = _pair(low, high)
    g_rows = torch.empty_like(rows)
    g_clip = [None if share is None else torch.zeros_like(share) for share in (low, high)]
    for piece, x in _pieces(rows):
        ends = x.min(-1, keepdim=True), x.max(-1, keepdim=True)
        found = _choose(ends[0].values, ends[1].values, clip, grid)
        g_x = grad[piece].to(x.dtype, copy=True)
        g_ends = _straight_through_(g_x, x, offset, found, clip is not None, grid)
        for sign, (value, index), g_end, share, g_share in zip((-1, 1), ends, g_ends, (low, high), g_clip, strict=True):
            # Where all elements lie on one side of zero the range ends at zero, which no element moves.
            g_end = torch.where(sign * value > 0, g_end, 0)
            if g_share is not None:
                g_share += (g_end * value).sum()
            g_x.scatter_add_(-1, index, g_end if share is None else g_end * share)
        g_rows[piece] = g_x
    return g_rows, g_clip[0], g_clip[1]


class _QuantizeTokens(torch.autograd.Function):
    """Keeps the rows, and nothing else, for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, offset: Tensor | None, low: Tensor | None, high: Tensor | None, grid: IntGrid
    ) -> Tensor:
        ctx.grid = grid
        ctx.save_for_backward(rows, offset, low, high)
        out = torch.empty_like(rows)
        _quantize(rows, offset, low, high, grid, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, offset, low, high = ctx.saved_tensors
        g_rows, g_low, g_high = _gradients(rows, offset, low, high, ctx.grid, grads[0])
        return g_rows, None, g_low, g_high, None


def _pair(low: Tensor | None, high: Tensor | None) -> Clip | None:
    return None if low is None or high is None else (low, high)


def _straight_through_(
    grad: Tensor, x: Tensor, offset: Tensor | None, found: _Range, clips: bool, grid: IntGrid
) -> tuple[Tensor, Tensor]:
    """Gradients of the range's two ends; ``grad`` becomes that of the rows with their range held fixed."""
    position = x / found.scale
    rounded = position.round() if offset is None else (position + offset).round_()
    steps = _clamped(rounded, found.zero_point, grid, out=None if clips else rounded)
    clipped = torch.zeros_like(found.lo)
    if clips:
        g_steps = steps * grad
        beyond = rounded.sub_(steps).abs_().clamp_(max=1).mul_(grad)  # the gradient where a code was clipped
        clipped = beyond.sum(-1, keepdim=True)
        g_scale = g_steps.addcmul_(grad.sub_(beyond), position, value=-1).sum(-1, keepdim=True)
        if not grid.symmetric:
            g_scale.addcmul_(found.lo / found.scale, clipped, value=-1)
    else:  # only the rounding of the zero-point can clip, by less than a step: straight-through as well
        g_scale = steps.sub_(position).mul_(grad).sum(-1, keepdim=True)
    if grid.symmetric:  # scale = max(hi / qmax, lo / qmin), and zero_point = 0
        from_hi = found.hi / grid.qmax >= found.lo / grid.qmin
        return torch.where(from_hi, 0, g_scale / grid.qmin), torch.where(from_hi, g_scale / grid.qmax, 0)
    g_hi = g_scale / (grid.qmax - grid.qmin)
    return clipped - g_hi, g_hi


def quantize_tokens(
    x: Tensor, bits: int, symmetric: bool = False, offset: Tensor | None = None, clip: Clip | None = None
) -> Tensor:
    """The quantized value of activations, differentiable in ``x`` and ``clip``.

    Args:
        x: [..., K], any floating dtype, which the result has too.
        bits: Width of a code.
        symmetric: No zero-point.
        offset: [K], |o| < 1/2, added to ``x / scale`` before rounding: the copies of a split channel carry
            ``(2t - T + 1) / 2T``, so that the sum of their T codes is the channel's own, at its own step.
        clip: Kept share of the lower and of the upper end of every row's range, scalars.
    """
    low, high = clip if clip is not None else (None, None)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not torch.is_grad_enabled():  # an op that the compiler takes as it is
        return torch.ops.plquant.quantize_tokens(rows, bits, symmetric, offset, low, high).view(x.shape)
    return _QuantizeTokens.apply(rows, offset, low, high, IntGrid(bits, None, symmetric)).view(x.shape)


def _op(
    rows: Tensor, bits: int, symmetric: bool, offset: Tensor | None, low: Tensor | None, high: Tensor | None
) -> Tensor:
    out = torch.empty_like(rows)
    _quantize(rows, offset, low, high, IntGrid(bits, None, symmetric), out)
    return out


_library = torch.library.Library("plquant", "FRAGMENT")
_library.define(
    "quantize_tokens(Tensor rows, int bits, bool symmetric, Tensor? offset, Tensor? low, Tensor? high) -> Tensor"
)
_library.impl("quantize_tokens", _op, "CompositeExplicitAutograd")
torch.library.register_fake("plquant::quantize_tokens", lambda rows, *rest: torch.empty_like(rows), lib=_library)


@torch.no_grad()
def token_codes(
    x: Tensor, bits: int, symmetric: bool = False, offset: Tensor | None = None, clip: Clip | None = None
) -> TokenCodes:
    """The codes behind ``quantize_tokens`` of the same arguments."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    codes = torch.empty_like(rows, dtype=torch.int8 if symmetric else torch.uint8)
    low, high = clip if clip is not None else (None, None)
    scale, zero_point = _quantize(rows, offset, low, high, IntGrid(bits, None, symmetric), codes)
    per_row = (*x.shape[:-1], 1)
    kept = None if symmetric else zero_point.to(torch.uint8).view(per_row)
    return TokenCodes(codes.view(x.shape), scale.view(per_row), kept)
