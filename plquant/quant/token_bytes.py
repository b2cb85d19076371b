"""Quantized tokens as bytes, a row of uint8 for each: what a cache of integers keeps of keys and values.

    scale         fp32 (fp64 of fp64 tokens)
    zero-point    one byte, none on a symmetric grid
    codes         from 0, K bits / 8 bytes

Codes are cut into planes of 8, 4, 2 and 1 bits, those that add up to their width, lowest bits first. Byte j of a plane
of n bytes holds channels j, j + n, j + 2 n, ..., from its lowest bits on: n codes are written at once.

On a CPU the work is that of quantize.cpp, as in ``token_quantize``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plquant.quant import native
from plquant.quant.grid import IntGrid
from plquant.quant.token_quantize import TokenCodes, token_codes

# Letters: K channels, N bytes of a row.

CHANNELS = 8  # a row has a multiple of so many, so that every plane ends with a byte

_library = torch.library.Library("plquant", "FRAGMENT")
_library.define("tokens_to_bytes(Tensor x, int bits, bool symmetric) -> Tensor")
_library.define("tokens_from_bytes(Tensor rows, int bits, bool symmetric, ScalarType dtype) -> Tensor")


def row_bytes(channels: int, bits: int, symmetric: bool, dtype: torch.dtype) -> int:
    """N, of a row of so many channels of this dtype.

    Raises:
        ValueError: They do not fill bytes.
    """
    if channels % CHANNELS:
        raise ValueError(f"tokens of {channels} channels cannot be kept as bytes; a multiple of {CHANNELS} can")
    return _head(symmetric, dtype) + channels // CHANNELS * bits


def _to_bytes(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    size = row_bytes(x.shape[-1], bits, symmetric, x.dtype)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(len(rows), size, dtype=torch.uint8, device=x.device)
    if native.takes_rows(rows, (), out):
        native.rows_to_bytes(rows, IntGrid(bits, None, symmetric), out)
        return out.view(*x.shape[:-1], size)
    tokens = token_codes(rows, bits, symmetric)
    codes = tokens.codes.view(torch.uint8) + (1 << (bits - 1)) if symmetric else tokens.codes
    parts = [tokens.scale.view(torch.uint8)]
    if tokens.zero_point is not None:
        parts.append(tokens.zero_point)
    for width in _planes(bits):
        fields = (codes & ((1 << width) - 1)).unflatten(-1, (8 // width, -1))
        parts.append((fields << _shifts(width, x.device)).sum(-2, dtype=torch.uint8))
        codes = codes >> width if width < 8 else codes
    return torch.cat(parts, -1, out=out).view(*x.shape[:-1], size)


def _from_bytes(rows: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Tensor:
    head, channels = _head(symmetric, dtype), _channels(rows, bits, symmetric, dtype)
    flat = rows.reshape(-1, rows.shape[-1]).contiguous()
    out = torch.empty(len(flat), channels, dtype=dtype, device=rows.device)
    if native.takes_rows(out, (), flat):
        native.rows_from_bytes(flat, IntGrid(bits, None, symmetric), out)
        return out.view(*rows.shape[:-1], channels)
    wide = torch.promote_types(dtype, torch.float32)
    scale, zero_point = flat[:, : wide.itemsize].contiguous().view(wide), flat[:, head - 1 : head]
    codes, low = torch.zeros(len(flat), channels, dtype=torch.uint8, device=rows.device), 0
    for width in _planes(bits):
        plane = flat[:, head : head + channels * width // 8]
        head += plane.shape[1]
        fields = plane[:, None] >> _shifts(width, rows.device) & ((1 << width) - 1)
        codes |= fields.flatten(1) << low
        low += width
    if symmetric:
        zero_point = torch.full_like(zero_point, 1 << (bits - 1))
    return TokenCodes(codes, scale, zero_point).dequantize(dtype).view(*rows.shape[:-1], channels)


def _fake_to_bytes(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], row_bytes(x.shape[-1], bits, symmetric, x.dtype), dtype=torch.uint8)


def _fake_from_bytes(rows: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], _channels(rows, bits, symmetric, dtype), dtype=dtype)


def _head(symmetric: bool, dtype: torch.dtype) -> int:
    """Bytes before the codes."""
    return torch.promote_types(dtype, torch.float32).itemsize + (not symmetric)


def _channels(rows: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> int:
    return (rows.shape[-1] - _head(symmetric, dtype)) // bits * CHANNELS


def _planes(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)[:, None]


for _name, _implementation, _shapes in (
    ("tokens_to_bytes", _to_bytes, _fake_to_bytes),
    ("tokens_from_bytes", _from_bytes, _fake_from_bytes),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"plquant::{_name}", _shapes, lib=_library)


def tokens_to_bytes(x: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """The integers behind ``quantize_tokens`` of the same arguments, uint8 [..., N].

    Args:
        x: [..., K], any floating dtype, K a multiple of 8.
        bits: Width of a code.
        symmetric: No zero-point.

    Raises:
        ValueError: K is none.
    """
    return torch.ops.plquant.tokens_to_bytes(x, bits, symmetric)


def tokens_from_bytes(rows: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Tensor:
    """What ``quantize_tokens`` makes of the tokens that ``rows`` came from, to the bit.

    Args:
        rows: uint8 [..., N].
        bits: As they were given to ``tokens_to_bytes``.
        symmetric: Likewise.
        dtype: That of the tokens.

    Returns:
        [..., K].
    """
    return torch.ops.plquant.tokens_from_bytes(rows, bits, symmetric, dtype)
