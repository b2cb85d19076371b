"""The ops against their specification: every width, axis, kind, group size and dtype."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from plquant.kernels import cpu, native, ops, reference, run_time
from plquant.kernels.cpu_layout import Shape, Weight, codes_of, lay_out, per_group_of

N, K = 96, 192
# Of the norm of the result, which is rounded once: by 2^-8 in bf16 and 2^-11 in fp16 at most, by less on average.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
needs_kernels = pytest.mark.skipif(not native.available(), reason="no kernels for this CPU")


def made(
    bits: int, along_out: bool, size: int, dtype: torch.dtype = torch.float32, symmetric: bool = False
) -> tuple[Weight, Shape, Tensor]:
    generator = torch.Generator().manual_seed(bits)
    shape = Shape(N, K, bits, size, along_out)
    groups = (N // size, K) if along_out else (N, K // size)
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(groups, generator=generator) + 0.5).to(dtype)
    zero_point = None if symmetric else torch.randint(0, 1 << bits, groups, dtype=torch.uint8, generator=generator)
    return lay_out(codes, scale, zero_point, shape), shape, codes


def activations(m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, K, generator=generator).to(dtype), torch.randn(N, generator=generator).to(dtype)


def error(output: Tensor, expected: Tensor) -> float:
    return ((output.double() - expected).norm() / expected.norm()).item()


def exact(weight: Weight, shape: Shape) -> Tensor:
    return reference.dequantize(weight._replace(scale=weight.scale.double()), shape)


@pytest.mark.parametrize("size", [96, 48, 32, 12], ids="g{}".format)
@pytest.mark.parametrize("along_out", [False, True], ids=["in", "out"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_come_back_and_take_their_bits(bits: int, along_out: bool, size: int) -> None:
    weight, shape, codes = made(bits, along_out, size)
    assert torch.equal(codes_of(weight, shape), codes)
    assert weight.codes.nbytes * 8 == bits * shape.padded_out * shape.padded_in
    assert per_group_of(weight.scale, shape).shape == ((N // size, K) if along_out else (N, K // size))


@needs_kernels
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("size", [96, 32, 12], ids="g{}".format)
@pytest.mark.parametrize("along_out", [False, True], ids=["in", "out"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_products_are_those_of_the_reference(
    bits: int, along_out: bool, size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    weight, shape, _ = made(bits, along_out, size, dtype, symmetric)
    for m in (1, 3, 8, 20, 40):  # many rows meet weights that are rounded to the dtype
        x, bias = activations(m, dtype)
        expected = x.double() @ exact(weight, shape).t() + bias.double()
        few = m * native.parts(dtype) <= cpu.FEW and not (native.amx() and dtype == torch.bfloat16 and m > 4)
        rounds = not few or (dtype == torch.bfloat16 and along_out)
        assert error(ops.linear(x, *weight, bias, *shape), expected) < BOUND[dtype] * (2 if rounds else 1)


@needs_kernels
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("along_out", [False, True], ids=["in", "out"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_called_without_python_it_is_the_same_product(
    bits: int, along_out: bool, symmetric: bool, dtype: torch.dtype
) -> None:
    native.dispatch_()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("plquant::few_rows", "CPU")
    for size in (96, 12):
        weight, shape, _ = made(bits, along_out, size, dtype, symmetric)
        for m in range(1, native.MOST_DISPATCHED_ROWS + 1):
            x, bias = activations(m, torch.bfloat16)
            for rows, added in ((x, None), (x[None], bias)):
                output = ops.few_rows(rows, *weight, added, *shape)
                assert torch.equal(output, ops.linear(rows, *weight, added, *shape))
                for inputs in ((4, False, torch.linspace(-0.4, 0.3, K), torch.tensor([0.6, 0.8])), (8, True, None)):
                    output = ops.few_quantized_rows(rows, *weight, added, *shape, *inputs)
                    assert torch.equal(output, ops.quantized_linear(rows, *weight, added, *shape, *inputs))


@needs_kernels
def test_few_rows_in_bf16_are_called_without_python(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("few_rows", "linear", "few_quantized_rows", "quantized_linear"):
        monkeypatch.setattr(ops, name, lambda x, *rest, name=name: called.append(name))
    _, shape, codes = made(4, False, 32)
    kept, tensors = run_time.Vectors.lay_out(run_time.Affine(codes, torch.ones(N, K // 32), None), shape)
    for x in (torch.zeros(1, 1, K), torch.zeros(2, 2, K), torch.zeros(5, K), torch.zeros(K, 2).mT):
        kept.linear(x.bfloat16(), tensors, None, None)
    kept.linear(torch.zeros(1, K), tensors, None, None)
    assert called == ["few_rows"] * 2 + ["linear"] * 3
    called.clear()
    for rows in (4, 5):
        kept.linear(torch.zeros(rows, K).bfloat16(), tensors, None, run_time.Inputs(4, False, None))
    assert called == ["few_quantized_rows", "quantized_linear"]


@needs_kernels
def test_called_without_python_it_names_a_wrong_argument() -> None:
    """What would be read or written beyond its end."""
    native.dispatch_()
    weight, shape, _ = made(4, False, 32)
    right = {"x": torch.zeros(1, K).bfloat16(), "bias": None} | weight._asdict() | shape._asdict()
    many = torch.zeros(native.MOST_DISPATCHED_ROWS + 1, K).bfloat16()
    wrong: list[tuple[str, dict[str, Any]]] = [
        *(WRONG | {"bias": {"bias": torch.zeros(N)}}).items(),
        *[("x", {"x": x}) for x in (torch.zeros(1, K), torch.zeros(K, 1).bfloat16(), many, many[:0])],
        *[("scale", {"scale": weight.scale.double()}), ("codes", {"codes": weight.codes.mT})],
    ]
    ops.few_rows(**right)
    for name, arguments in wrong:
        with pytest.raises(RuntimeError, match=f"argument `{name}`"):
            ops.few_rows(**right | arguments)
    right |= {"x_bits": 4, "x_symmetric": False, "x_offset": torch.zeros(K), "x_clip": torch.ones(2)}
    wrong += [("x_bits", {"x_bits": bits}) for bits in (1, 9)]
    wrong += [("x_offset", {"x_offset": offset}) for offset in (torch.zeros(K - 1), torch.zeros(K).double())]
    wrong += [("x_clip", {"x_clip": torch.ones(1)})]
    ops.few_quantized_rows(**right)
    for name, arguments in wrong:
        with pytest.raises(RuntimeError, match=f"argument `{name}`"):
            ops.few_quantized_rows(**right | arguments)


@needs_kernels
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("along_out", [False, True], ids=["in", "out"])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_quantized_products_are_those_of_the_codes(
    bits: int, along_out: bool, symmetric: bool, dtype: torch.dtype
) -> None:
    weight, shape, _ = made(bits, along_out, 96, dtype, symmetric)
    offset, clip = torch.linspace(-0.4, 0.3, K), torch.tensor([0.6, 0.8])
    for m in (1, 3, 5, 16, 17, 40):  # blocks of 1, 4 and 16 rows
        x, bias = activations(m, dtype)
        steps, scale = reference.quantize_rows(x, bits, symmetric, offset, clip)
        expected = scale.double() * (steps.double() @ exact(weight, shape).t()) + bias.double()
        output = ops.quantized_linear(x, *weight, bias, *shape, bits, symmetric, offset, clip)
        tiled = dtype == torch.bfloat16 and native.amx() and m > 16  # of weights in bf16: there are two groups
        rounds = tiled or (along_out and (m >= 16 or dtype == torch.bfloat16))
        assert error(output, expected) < BOUND[dtype] * (2 if rounds else 1)


@needs_kernels
@pytest.mark.parametrize("amx", [True, False], ids=["AMX", "no AMX"])
@pytest.mark.parametrize("threads", [1, 2])
def test_many_rows_of_sizes_that_fill_no_tile(threads: int, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not amx:
        monkeypatch.setattr(native, "amx", lambda: False)
    elif not native.amx():
        pytest.skip("no AMX")
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    for n, k, size, along_out in (
        (71, 96, 96, False),
        (600, 1120, 1120, False),
        (71, 90, 30, False),
        (60, 77, 20, True),
    ):
        for bits in (3, 4, 6, 8):
            shape = Shape(n, k, bits, size, along_out)
            groups = (n // size, k) if along_out else (n, k // size)
            codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)
            zeros = torch.randint(0, 1 << bits, groups, dtype=torch.uint8, generator=generator)
            weight = lay_out(codes, (torch.rand(groups, generator=generator) + 0.5).bfloat16(), zeros, shape)
            wide = exact(weight, shape)
            for m in (5, 17, 33, 520):
                x = torch.randn(m, k, generator=generator).bfloat16()
                plain = error(reference.linear(x, weight, None, shape), x.double() @ wide.t())
                assert error(ops.linear(x, *weight, None, *shape), x.double() @ wide.t()) < 1.1 * plain
                steps, scale = reference.quantize_rows(x, 8, False, None)
                expected = scale.double() * (steps.double() @ wide.t())
                output = ops.quantized_linear(x, *weight, None, *shape, 8, False, None)
                assert error(output, expected) < (1.1 if amx else 1.35) * plain  # torch rounds, then the scale does


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_products_with_a_plain_weight(threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that fill no vector, the rows of our kernel and more, and one token of many, which has odd strides."""
    torch.set_num_threads(threads)
    monkeypatch.setattr(cpu, "SCRATCH_BYTES", 1 << 12)  # of which a weight takes several
    for n, k in ((71, 70), (64, 96), (5, 33)):
        generator = torch.Generator().manual_seed(n)
        weight, bias = torch.randn(n, k, generator=generator).to(dtype), torch.randn(n, generator=generator).to(dtype)
        x = torch.randn(2, 9, k, generator=generator).to(dtype)
        for rows in (x[:1, -1:], x[0, :2], x[0, :3], x[:, -2:], x):
            for added in (None, bias):
                expected = rows.double() @ weight.double().t() + (0 if added is None else added.double())
                assert error(ops.dense_linear(rows, weight, added), expected) < BOUND[dtype]
    assert ops.dense_linear(x[:, :0], weight, None).shape == (2, 0, 5)
    with pytest.raises(ValueError, match="argument `x` to be of shape"):
        ops.dense_linear(x[..., 1:], weight, None)
    with pytest.raises(ValueError, match="argument `weight`"):
        ops.dense_linear(x, weight.double(), None)
    for rows in (x, x[:1, :1]):
        torch.library.opcheck(
            ops.dense_linear.default, (rows, weight, bias), test_utils=("test_schema", "test_faketensor")
        )


@needs_kernels
def test_integer_products_are_exact() -> None:
    """Codes at their ends, over so many inputs that a sum just fits 32 bits."""
    k = native.MOST_INTEGER_INPUTS
    shape = Shape(16, k, 8, k, False)
    weight = lay_out(torch.full((16, k), 255, dtype=torch.uint8), torch.ones(16, 1), torch.zeros(16, 1).byte(), shape)
    for m in (1, 4, 6, 33, 530):
        x = -torch.ones(m, k)
        x[0] = 1
        if native.vectors() == "AVX2":  # the op has more rows of 8 bits multiplied in fp32
            output = native.integer_rows(native.row_codes(x, 8, False, None), weight, shape, None, x.dtype)
        else:
            output = ops.quantized_linear(x, *weight, None, *shape, 8, False, None)
        steps, scale = reference.quantize_rows(x, 8, False, None)
        expected = (steps.double().sum(1) * 255).float() * scale[:, 0]
        assert torch.equal(output, expected[:, None].expand(m, 16)), m


@needs_kernels
def test_activations_get_the_steps_of_the_specification() -> None:
    x = torch.cat([torch.randn(30, K), torch.zeros(1, K), torch.rand(1, K), -torch.rand(1, K)])
    for bits in range(2, 9):
        for symmetric, clip in itertools.product((False, True), (None, torch.tensor([0.5, 0.9]))):
            steps, scale = native.quantize_rows(x, bits, symmetric, None, clip)
            expected = reference.quantize_rows(x, bits, symmetric, None, clip)
            assert torch.equal(steps, expected[0]) and torch.equal(scale[:, None], expected[1])
            codes = native.row_codes(x, bits, symmetric, None, clip)
            assert torch.equal((codes.codes - codes.zero_point[:, None]).float(), steps)
            assert torch.equal(codes.sums, codes.codes.sum(1, dtype=torch.int32)) and torch.equal(codes.scale, scale)


@needs_kernels
@pytest.mark.parametrize("size", [8, 32, K])
def test_a_number_that_is_none_is_not_lost(size: int) -> None:
    weight, shape, _ = made(4, False, size)
    for m in (1, 3, 20):
        x = torch.randn(m, K)
        x[-1, 5] = torch.nan
        output = ops.quantized_linear(x, *weight, None, *shape, 4, False, None)
        assert output[-1].isnan().all() and output[:-1].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("along_out", [False, True], ids=["in", "out"])
def test_no_outputs_at_all(along_out: bool) -> None:
    shape = Shape(0, K, 4, 16, along_out)
    codes, groups = (0, shape.padded_in // 32, 4, 32), (0, shape.padded_in) if along_out else (0, shape.groups, 16)
    weight = Weight(torch.zeros(codes, dtype=torch.int16), torch.zeros(groups), None)
    for x in (torch.ones(1, K), torch.ones(2, K).bfloat16(), torch.ones(40, K)):
        assert ops.linear(x, *weight, None, *shape).shape == (len(x), 0)
        assert ops.quantized_linear(x, *weight, None, *shape, 4, False, None).shape == (len(x), 0)


def test_nothing_is_dispatched_where_the_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "_dispatch_library", lambda: pytest.fail("it would run them"))
    native.dispatch_.__wrapped__()


def test_any_leading_shape_strides_and_nothing_at_all() -> None:
    weight, shape, _ = made(4, False, 32)
    x = torch.randn(K, 3, 2).permute(2, 1, 0)
    output = ops.linear(x, *weight, None, *shape)
    torch.testing.assert_close(output, reference.linear(x, weight, None, shape), rtol=1e-5, atol=1e-4)
    assert ops.linear(x[0, 0], *weight, None, *shape).shape == (N,)
    assert ops.linear(x[:, :0], *weight, None, *shape).shape == (2, 0, N)
    assert ops.quantized_linear(x[:, :0], *weight, None, *shape, 4, False, None).shape == (2, 0, N)


WRONG: dict[str, dict[str, Any]] = {
    "x": {"x": torch.zeros(1, K + 1)},
    "codes": {"codes": torch.zeros(1, dtype=torch.int16)},
    "scale": {"scale": torch.zeros(1)},
    "zero_point": {"zero_point": torch.zeros(6, N)},
    "bias": {"bias": torch.zeros(N, dtype=torch.bfloat16)},
    "group_size": {"group_size": 7},
    "bits": {"bits": 9},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    weight, shape, _ = made(4, False, 32)
    arguments = {"x": torch.zeros(1, K), "bias": None} | weight._asdict() | shape._asdict() | WRONG[name]
    with pytest.raises(ValueError, match=f"argument `{name}`"):
        ops.linear(**arguments)
    with pytest.raises(ValueError, match="argument `codes` to be on cpu"):
        ops.linear(torch.zeros(1, K), weight.codes.to("meta"), *weight[1:], None, *shape)


def test_the_compiler_sees_through() -> None:
    weight, shape, _ = made(4, True, 32)
    run = torch.compile(lambda x: ops.linear(x + 1, *weight, None, *shape) * 2, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, K)
    assert torch.equal(run(x), ops.linear(x + 1, *weight, None, *shape) * 2)
    torch.library.opcheck(ops.linear.default, (x, *weight, None, *shape), test_utils=("test_schema", "test_faketensor"))
