"""The product is that with the dequantized weight; sums differ in their order only."""

import pytest
import torch

pytest.importorskip("triton")
from plquant.kernels import prefill
from tests.kernels.quantized import error_ratio, inputs, quantized

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_width(bits: int, dtype: torch.dtype) -> None:
    for shape, group, symmetric, rows in (((128, 256), 128, False, 40), ((72, 160), 32, True, 17)):
        packed, weight = quantized(bits, shape, group, "in", dtype, symmetric)
        x = inputs(rows, shape[1], dtype)
        assert error_ratio(prefill.linear(x, packed), x, weight) <= 1.1


def test_one_scale_per_channel_and_widths_that_nothing_divides() -> None:
    for shape, rows in (((130, 200), 70), ((33, 40), 3)):
        packed, weight = quantized(4, shape, shape[1])
        x = inputs(rows, shape[1])
        out = prefill.linear(x, packed)
        assert error_ratio(out, x, weight) <= 1.1
        assert torch.equal(out, prefill.linear(x, packed))


def test_without_inline_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "_capability", lambda device: 0)
    for bits, dtype in ((4, torch.float16), (3, torch.bfloat16), (8, torch.bfloat16)):
        packed, weight = quantized(bits, (32, 128), 32, "in", dtype)
        x = inputs(20, 128, dtype)
        assert error_ratio(prefill.linear(x, packed), x, weight) <= 1.1


def test_what_does_not_fit_is_refused() -> None:
    packed, _ = quantized(4, (32, 64), 32)
    with pytest.raises(ValueError, match="not \\(rows, 64\\)"):
        prefill.linear(inputs(20, 32), packed)
    with pytest.raises(ValueError, match="bfloat16"):
        prefill.linear(inputs(20, 64, torch.bfloat16), packed)
    with pytest.raises(ValueError, match="along the output"):
        prefill.linear(inputs(20, 64), quantized(4, (32, 64), 32, "out")[0])
