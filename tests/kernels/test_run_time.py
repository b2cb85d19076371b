"""Packed linears as on a GPU, from ``prepare_`` to the result: the device is a CPU, kernels are interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
from plquant.kernels import gpu, kronecker, ops, run_time
from plquant.kernels.run_time import Fragments, Integers
from plquant.nn.activation_quantizer import ActivationQuantizer
from plquant.nn.online import attach_online_
from plquant.nn.packed_linear import PackedLinear
from plquant.quant.fake_quantize import quantize_weight
from plquant.quant.grid import IntGrid
from plquant.transforms.online import KroneckerOp
from tests.kernels.quantized import error_ratio

IN, OUT, CHANNEL = IntGrid(4, 32), IntGrid(3, 32, axis="out"), IntGrid(4, None)
CASES = {
    "W4 g32": (IN, None, Fragments),
    "W3 g32 symmetric": (IntGrid(3, 32, symmetric=True), None, Fragments),
    "W4 g32 along out": (IntGrid(4, 32, axis="out"), None, Fragments),
    "W4 per channel": (CHANNEL, None, Fragments),
    "W4A4": (CHANNEL, 4, Integers),
    "W8A8 symmetric": (IntGrid(8, None, symmetric=True), 8, Integers),
    "W4A8 g32": (IN, 8, Fragments),
    "W6A6 along out": (IntGrid(6, 32, axis="out"), 6, Fragments),
}


def made(grid: IntGrid, x_bits: int | None, dtype: torch.dtype, shape: tuple[int, int] = (96, 160)) -> PackedLinear:
    generator = torch.Generator().manual_seed(grid.bits)
    linear = PackedLinear(
        quantize_weight(torch.randn(shape, generator=generator).to(dtype), grid),
        torch.randn(shape[0], generator=generator).to(dtype),
    )
    if x_bits is not None:
        offset = torch.linspace(-0.4, 0.3, shape[1])
        linear.inputs = ActivationQuantizer(x_bits, grid.symmetric, offset, torch.tensor([0.7, 0.85]))
    return linear


def activations(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def exact(linear: PackedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the activations that are multiplied, in float64, and in fp32."""
    weight = linear.quantized()
    wide = type(weight)(weight.codes, weight.scale.double(), weight.zero_point, weight.grid).dequantize()
    return wide, x if linear.inputs is None else linear.inputs(x.float())


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_packed_weight(case: str, dtype: torch.dtype) -> None:
    grid, x_bits, kind = CASES[case]
    linear = made(grid, x_bits, dtype)
    weight, bias = linear.quantized(), linear.bias
    assert bias is not None
    linear.prepare_()
    assert isinstance(linear.prepared, kind)
    for name in ("codes", "scale", "zero_point"):
        found, expected = getattr(linear.quantized(), name), getattr(weight, name)
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected) and found.dtype == expected.dtype
    for rows in (1, 20, 260):  # decode, prefill, dequantized
        x = activations(2, rows, 160, dtype=dtype)[0]
        wide, inputs = exact(linear, x)
        linear.bias = None
        plain = linear(x)
        if x_bits is None:
            assert error_ratio(plain, x, wide) <= (1.25 if grid.axis == "out" else 1.1)
        else:  # codes and sums of them are exact: what is left is the rounding of the result, or of x and the result
            sums = inputs.double() @ wide.t()
            bound = {torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]
            assert (plain.double() - sums).norm() <= (1 if kind is Integers else 2) * bound * sums.norm()
        linear.bias = bias
        assert torch.equal(linear(x), plain + bias)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("case", ["W4 g32", "W4A4", "W4A8 g32"])
def test_any_leading_shape_strides_and_nothing_at_all(case: str) -> None:
    grid, x_bits, _ = CASES[case]
    linear = made(grid, x_bits, torch.float16)
    linear.prepare_()
    x = activations(160, 3, 2, dtype=torch.float16).permute(2, 1, 0)
    output = linear(x)
    assert torch.equal(output.view(6, 96), linear(x.reshape(6, 160)))
    assert linear(x[0, 0]).shape == (96,) and linear(x[:, :0]).shape == (2, 0, 96)
    wide = linear(x.float())
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.half(), output, rtol=2e-3, atol=2e-3)


def rotation(dtype: torch.dtype) -> KroneckerOp:
    """Of 160 channels: small integers, so that all sums are exact whatever their order."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-1, 2, (n, n), generator=generator).to(dtype) for n in (10, 16))
    return KroneckerOp(left, right / 8)


def whole_numbers(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-9, 10, (rows, 160), generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_kronecker_products_run_in_their_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []
    launch = kronecker._launch
    monkeypatch.setattr(kronecker, "_launch", lambda x, *rest: launches.append(len(x)) or launch(x, *rest))
    op = rotation(dtype)
    norm = nn.Identity()
    attach_online_(norm, [op, op])
    norm.online.kernels = True
    x = whole_numbers(6, dtype).view(2, 3, 160)
    assert torch.equal(norm(x), op(op(x))) and launches == [6, 6]
    assert norm(x[:0]).shape == (0, 3, 160)
    run = torch.compile(lambda x: norm(x + 1), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(x), op(op(x + 1)))
    launches.clear()
    assert norm(x.float()).dtype == torch.float32 and norm(x.clone().requires_grad_()).requires_grad
    assert not launches  # another dtype, and gradients, are for torch


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", ["W4A4", "W8A8 symmetric", "W4A8 g32"])
def test_activations_are_quantized_as_they_are_rotated(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, x_bits, kind = CASES[case]
    linear, op = made(grid, x_bits, dtype), rotation(dtype)
    assert linear.inputs is not None
    quantizer = linear.inputs
    quantizer.clip = None
    linear.prepare_()
    expected = {rows: linear(op(op(whole_numbers(rows, dtype)))) for rows in (1, 20)}
    attach_online_(linear, [op, op])
    quantized: list[int] = []
    alone = gpu.quantize_tokens
    monkeypatch.setattr(gpu, "quantize_tokens", lambda x, *rest: quantized.append(len(x)) or alone(x, *rest))
    for rows, product in expected.items():
        assert torch.equal(linear(whole_numbers(rows, dtype)), product)
    assert quantized == ([] if kind is Integers else [1, 20])
    x = whole_numbers(4, dtype)
    run = torch.compile(lambda x: linear(x + 1), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(x), linear(x + 1))
    quantized.clear()
    quantizer.clip = torch.tensor([0.7, 0.85])  # which the kernel has not
    linear(x)
    assert quantized == [4]


@pytest.mark.usefixtures("pretended")
def test_a_scale_of_the_product_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rotations of widths have that are no power of four."""
    launches: list[int] = []
    launch = kronecker._launch
    monkeypatch.setattr(kronecker, "_launch", lambda x, *rest: launches.append(len(x)) or launch(x, *rest))
    x, op = whole_numbers(4, torch.bfloat16), rotation(torch.bfloat16)
    scaled = KroneckerOp(op.left, op.right, 0.75)
    norm = nn.Identity()
    attach_online_(norm, [scaled])
    norm.online.kernels = True
    assert torch.equal(norm(x), scaled(x)) and not torch.equal(norm(x), op(x))
    linear = made(CHANNEL, 4, torch.bfloat16)
    assert linear.inputs is not None
    linear.inputs.clip = None
    linear.prepare_()
    expected = linear(scaled(x))
    attach_online_(linear, [scaled])
    assert torch.equal(linear(x), expected)
    assert launches == [4, 4, 4]


@pytest.mark.usefixtures("pretended")
def test_wrong_factors_are_named() -> None:
    x, op = whole_numbers(2, torch.float16), rotation(torch.float16)
    with pytest.raises(ValueError, match="argument `left` to be torch.float16"):
        ops.kronecker(x, op.left.float(), op.right)
    with pytest.raises(ValueError, match="argument `right` to be of shape"):
        ops.kronecker(x, op.left, op.right[:, 1:])
    with pytest.raises(ValueError, match=r"argument `x` to be of shape \[..., 160\]"):
        ops.kronecker(x[:, 1:], op.left, op.right)
    with pytest.raises(ValueError, match="argument `left` to be of at most 128 rows"):
        ops.kronecker(x, torch.zeros(129, 129).half(), op.right)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("case", ["W4 g32", "W4A4", "W4A8 g32"])
def test_the_compiler_sees_through(case: str) -> None:
    grid, x_bits, _ = CASES[case]
    linear = made(grid, x_bits, torch.float16)
    linear.prepare_()
    run = torch.compile(lambda x: linear(x + 1) * 2, fullgraph=True, backend="aot_eager")
    x = activations(2, 3, 160, dtype=torch.float16)
    assert torch.equal(run(x), linear(x + 1) * 2)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("case", CASES)
def test_another_dtype_or_device_is_laid_out_anew_and_saved_as_it_was(case: str) -> None:
    linear = made(*CASES[case][:2], torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    linear.prepare_()
    laid_out = linear.prepared
    assert linear.cpu().prepared is laid_out
    after = linear.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert linear.half().prepared is not None and linear.scale_dtype == torch.float16
    assert torch.equal(linear.quantized().codes, linear.bfloat16().quantized().codes)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("case", CASES)
def test_the_dtype_that_it_has_changes_nothing(case: str) -> None:
    """Not even what is fp32 in the layout of a model of halves."""
    linear = made(*CASES[case][:2], torch.bfloat16)
    linear.prepare_()
    x = activations(3, 160, dtype=torch.bfloat16)
    expected, laid_out = linear(x), linear.prepared
    assert torch.equal(linear.bfloat16()(x), expected) and linear.prepared is laid_out


def test_a_weight_without_kernels_stays_as_it_is_and_a_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    device, shape = torch.device("cuda"), run_time.Shape(64, 96, 4, 32, False)
    assert run_time.kind(device, torch.float16, shape, False) is Fragments
    assert run_time.kind(device, torch.float16, shape._replace(group_size=96), True) is Integers
    assert run_time.kind(device, torch.float16, shape, True) is Fragments
    assert run_time.kind(torch.device("meta"), torch.float16, shape, False) is None
    with pytest.warns(UserWarning, match="not in torch.float32"):
        assert run_time.kind(device, torch.float32, shape, False) is None
    with pytest.warns(UserWarning, match="group_size=16"):
        assert run_time.kind(device, torch.float16, shape._replace(group_size=16), False) is None
    wide = run_time.Shape(64, 40000, 8, 40000, False)
    assert run_time.kind(device, torch.float16, wide, True) is Fragments


@pytest.mark.usefixtures("pretended")
def test_wrong_arguments_are_named() -> None:
    linear = made(IntGrid(3, 32), None, torch.float16)
    linear.prepare_()
    x = activations(2, 160, dtype=torch.float16)
    wrong = {"codes": "codes", "high": "high", "scale": "scale", "zero_point": "zero_point"}
    for name in wrong:
        kept = linear._buffers[name]
        linear._buffers[name] = torch.zeros(3)
        with pytest.raises(ValueError, match=f"argument `{name}`"):
            linear(x)
        linear._buffers[name] = kept
    with pytest.raises(ValueError, match="argument `x` to be of shape"):
        linear(x[:, 1:])
    linear = made(CHANNEL, 4, torch.float16)
    linear.prepare_()
    for name in ("codes", "scale", "zero_point", "sums"):
        kept = linear._buffers[name]
        linear._buffers[name] = torch.zeros(3)
        with pytest.raises(ValueError, match=f"argument `{name}`"):
            linear(x)
        linear._buffers[name] = kept


def test_rows_decide_which_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for module, name in ((gpu.decode, "decode"), (gpu.prefill, "prefill")):
        monkeypatch.setattr(module, "linear", lambda x, w, name=name: called.append(name) or x.new_zeros(len(x), 64))
    monkeypatch.setattr(gpu, "dequantize", lambda w: called.append("dequantize") or torch.zeros(64, 96).half())
    from tests.kernels.quantized import quantized

    for axis in ("in", "out"):
        weight, _ = quantized(4, (64, 96), 32, axis)  # type: ignore[arg-type]
        for rows in (1, 16, 17, 256, 257):
            gpu.linear(torch.zeros(rows, 96).half(), weight, None)
    assert called == ["decode"] * 2 + ["prefill"] * 2 + ["dequantize"] + ["decode"] * 2 + ["dequantize"] * 3
