"""Tokens as bytes and back: the numbers of fake quantization, in as many bytes as their bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plquant.quant import native
from plquant.quant.token_bytes import row_bytes, tokens_from_bytes, tokens_to_bytes
from plquant.quant.token_quantize import quantize_tokens

BITS = st.integers(2, 8)
DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float64]


def tokens(channels: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[2, 3, 5, channels], with a token of zeros, one of equal channels and one above zero."""
    x = torch.randn(2, 3, 5, channels, generator=torch.Generator().manual_seed(seed))
    x[0, 0, 0], x[0, 1, 0] = 0, -2.5
    x[1, 1, 1].abs_()
    return x.to(dtype)


@given(BITS, st.booleans(), st.sampled_from(DTYPES), st.sampled_from([8, 24, 64, 80, 128]), st.integers(0, 1000))
def test_they_come_back_as_fake_quantization_gives_them(
    bits: int, symmetric: bool, dtype: torch.dtype, channels: int, seed: int
) -> None:
    x = tokens(channels, seed, dtype)
    rows = tokens_to_bytes(x, bits, symmetric)
    head = (8 if dtype == torch.float64 else 4) + (0 if symmetric else 1)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, 5, head + channels * bits // 8)
    found = tokens_from_bytes(rows, bits, symmetric, dtype)
    assert found.dtype == dtype and torch.equal(found, quantize_tokens(x, bits, symmetric))
    turned = tokens_from_bytes(rows.transpose(1, 2)[:, 1:], bits, symmetric, dtype)
    assert torch.equal(turned, found.transpose(1, 2)[:, 1:])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_cpp_writes_the_bytes_of_plain_operations(
    bits: int, dtype: torch.dtype, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tokens(72, bits, dtype)
    assert native.available()
    rows = tokens_to_bytes(x, bits, symmetric)
    values = tokens_from_bytes(rows, bits, symmetric, dtype)
    monkeypatch.setattr(native, "takes_rows", lambda *rest: False)
    assert torch.equal(tokens_to_bytes(x, bits, symmetric), rows)
    assert torch.equal(tokens_from_bytes(rows, bits, symmetric, dtype), values)


def test_zeros_are_zeros() -> None:
    """What nobody has written to yet."""
    for symmetric in (False, True):
        rows = torch.zeros(2, row_bytes(16, 4, symmetric, torch.bfloat16), dtype=torch.uint8)
        assert (tokens_from_bytes(rows, 4, symmetric, torch.bfloat16) == 0).all()


def test_widths_that_fill_no_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens of 12 channels cannot be kept as bytes; a multiple of 8 can"):
        tokens_to_bytes(torch.zeros(1, 12), 4)


def test_the_compiler_takes_them_as_they_are() -> None:
    x = tokens(64, 0, torch.bfloat16)

    def both(x: torch.Tensor) -> torch.Tensor:
        return tokens_from_bytes(tokens_to_bytes(x + 1, 3), 3, False, x.dtype) - quantize_tokens(x + 1, 3)

    with torch.no_grad():
        assert not torch.compile(both, fullgraph=True, backend="aot_eager")(x).any()
    for op, arguments in (
        (torch.ops.plquant.tokens_to_bytes.default, (x, 4, True)),
        (torch.ops.plquant.tokens_from_bytes.default, (tokens_to_bytes(x, 4, True), 4, True, x.dtype)),
        (torch.ops.plquant.quantize_tokens.default, (x.flatten(0, 2), 4, True, None, None, None)),
    ):
        torch.library.opcheck(op, arguments)
