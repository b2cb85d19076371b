"""What vectors of either width have to get right: ends of memory, rounding, sums that no lane may lose."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plquant.kernels import native, reference
from plquant.kernels.cpu_layout import TILE, Shape, Weight, lay_out
from plquant.native import compiler
from tests.kernels.test_ops import needs_kernels


def made(n: int, k: int, bits: int, size: int, along_out: bool = False) -> tuple[Weight, Shape]:
    generator = torch.Generator().manual_seed(bits)
    groups = (n // size, k) if along_out else (n, k // size)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 1 << bits, groups, dtype=torch.uint8, generator=generator)
    shape = Shape(n, k, bits, size, along_out)
    return lay_out(codes, (torch.rand(groups, generator=generator) + 0.5).bfloat16(), zeros, shape), shape


def at_the_end(tensor: Tensor) -> Tensor:
    """The same numbers in memory behind which nothing may be read or written."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
    out = torch.frombuffer(memory, dtype=torch.uint8)[pages - tensor.nbytes : pages].view(tensor.dtype)
    return out.view(tensor.shape).copy_(tensor)


@needs_kernels
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_nothing_is_read_behind_the_end(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for n, k in ((5, 33), (23, 47), (16, 32), (31, 1)):
        weight, shape = made(n, k, 4, k)
        guarded = Weight(*(at_the_end(tensor) for tensor in weight if tensor is not None))
        for m in (1, 3):
            x, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((m, k), (n,)))
            ends = at_the_end(x), at_the_end(bias)
            parts, offset = native.parts(dtype), torch.rand(k, generator=generator)
            output = native.few_rows(ends[0], guarded, shape, ends[1], dtype, parts)
            assert torch.equal(output, native.few_rows(x, weight, shape, bias, dtype, parts))
            codes = native.row_codes(x, 8, False, offset)
            for found, expected in zip(native.row_codes(ends[0], 8, False, at_the_end(offset)), codes, strict=True):
                assert torch.equal(found, expected)
            output = native.integer_rows(codes._replace(codes=at_the_end(codes.codes)), guarded, shape, ends[1], dtype)
            assert torch.equal(output, native.integer_rows(codes, weight, shape, bias, dtype))
            if dtype == torch.bfloat16:
                plain = torch.randn(n, k, generator=generator).bfloat16()
                output = native.dense_rows(ends[0], at_the_end(plain), ends[1])
                assert torch.equal(output, native.dense_rows(x, plain, bias))


@needs_kernels
@pytest.mark.parametrize("bits", range(2, 9))
def test_sums_of_bytes_are_exact_at_their_ends(bits: int) -> None:
    n, k = 16, 192
    most = (1 << bits) - 1
    rows = torch.tensor([-128, 127]).repeat(17, k // 2)  # and then such that many of one sign meet
    rows[1], rows[2], rows[3, ::4], rows[4, ::3] = -128, 127, 127, -128
    for size in (192, 64, 12):
        shape = Shape(n, k, bits, size, False)
        codes = torch.full((n, k), most, dtype=torch.uint8)
        codes[1::2, ::3] = 0
        groups = (n, k // size)
        weight = lay_out(codes, torch.ones(groups), torch.full(groups, most, dtype=torch.uint8), shape)
        for zero in (0, -128, 127):
            for m in (1, 3, 17):
                x, zeros = rows[:m], torch.full((m,), zero, dtype=torch.int32)
                given = native.Codes(x.to(torch.int8), torch.ones(m), zeros, x.sum(1).to(torch.int32))
                found = native.integer_rows(given, weight, shape, None, torch.float32)
                assert torch.equal(found.long(), (x - zero) @ (codes.long() - most).t()), (size, zero, m)


@needs_kernels
@pytest.mark.parametrize("along_out", [False, True], ids=["in", "out"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_are_rounded_as_torch_does(bits: int, along_out: bool) -> None:
    weight, shape = made(48, 96, bits, 24, along_out)
    scale = weight.scale.float()  # whose products with integers lie halfway between two numbers, often
    scale.view(-1)[: scale.numel() // 2] *= 1.001
    scale.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, 3.4e38])  # the last rounds to more than there is
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(96, 48, dtype=dtype)
        native.dequantize(weight._replace(scale=scale), shape, slice(0, shape.padded_out // TILE), out)
        expected = reference.dequantize(weight._replace(scale=scale), shape).t().to(dtype)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.skipif(native.vectors() == "AVX2", reason="it is what the CPU has")
def test_both_widths_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def products() -> list[tuple[Tensor, float]]:
        found: list[tuple[Tensor, float]] = []
        for bits, along_out, m in [(bits, out, m) for bits in range(2, 9) for out in (False, True) for m in (1, 4, 20)]:
            weight, shape = made(60, 90, bits, 30, along_out)
            x, bias = (torch.randn(*size, generator=generator.manual_seed(m)) for size in ((m, 90), (60,)))
            for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
                few = native.few_rows(x.to(dtype), weight, shape, bias.to(dtype), dtype, native.parts(dtype))
                found.append((few, bound))
            if not along_out:
                codes = native.row_codes(x, bits, False, None)
                found += [(tensor, 0) for tensor in codes]
                found.append((native.integer_rows(codes, weight, shape, bias, torch.float32), 0))
        dense = torch.randn(33, 70, generator=generator.manual_seed(0)).bfloat16()
        found.append((native.dense_rows(dense[:3], dense, None), 4e-3))
        factors = dense[:7, :7].contiguous(), dense[:10, :10].contiguous()
        found.append((native.kronecker(dense, *factors, 0.5), 0))
        return found

    expected = products()
    monkeypatch.setattr(native, "vectors", lambda: "AVX2")
    for (found, bound), (other, _) in zip(products(), expected, strict=True):
        assert (found.double() - other.double()).norm() <= bound * other.double().norm()


BUILDS = {
    **{name: (native.SOURCE, native._flags(name)) for name in native.VECTORS},
    "AMX": (native.AMX_SOURCE, [*native._flags("AVX512"), *native.AMX_FLAGS]),
}


@needs_kernels
@pytest.mark.parametrize("name", BUILDS)
def test_what_another_cpu_needs_compiles_too(name: str) -> None:
    source, flags = BUILDS[name]
    check = [*compiler(), "-std=c++17", "-fopenmp", "-fsyntax-only", *flags, str(source)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_a_cpu_has_the_vectors_that_its_flags_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    amd = {"fma", "f16c", "avx2"}
    xeon = amd | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"}
    for flags, expected in ((xeon, "AVX512"), (xeon - {"avx512_bf16"}, "AVX2"), (amd, "AVX2"), (amd - {"f16c"}, "")):
        monkeypatch.setattr(native, "_cpu_flags", lambda flags=flags: flags)
        assert native.vectors.__wrapped__() == expected
    monkeypatch.setattr(native, "vectors", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert native._missing() == "the CPU lacks AVX2, FMA or F16C"


def test_another_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(Path, "read_text", lambda self: pytest.fail(f"there is no {self}"))
    assert not native._cpu_flags.__wrapped__()
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert native._missing() == "it is built on Linux only, not on darwin"
