"""Limits on the machine code of products, quantization and dequantization, on one target."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from bench.aot import Case, figures, violations
from bench.static import cases


def named(name: str) -> Case:
    return next(case for case in cases("sm_80") if case.name == name)


@pytest.mark.parametrize(
    "name",
    [
        "int gemm W8 128 rows",
        "int gemm W4 128 rows",
        "prefill W4 bf16 64 rows",
        "dequantize W4 bf16 in",
        "token quantize norm",
        "kronecker 64 x 64 quantize",
    ],
)
def test_limits_hold(name: str) -> None:
    found = figures(named(name), "sm_80")
    assert not list(violations(named(name), "sm_80", found))


def test_what_the_limits_are_for() -> None:
    """Loads moved ahead of products, and an order of inputs that x cannot be loaded in."""
    case = named("int gemm W8 128 rows")
    case.constants["KEEP"] = False
    found = " ".join(violations(case, "sm_80", figures(case, "sm_80")))
    assert "spills" in found and "per_mma" in found
    case = named("prefill W4 bf16 64 rows")
    case.constants["OPAQUE"] = False
    assert any("per_mma" in text for text in violations(case, "sm_80", figures(case, "sm_80")))


def test_packed_codes_are_multiplied_from_registers_on_sm_100() -> None:
    """In the large products of that target they would be spread by bytes, at twenty instructions a weight."""
    case = next(case for case in cases("sm_100") if case.name == "int gemm W4 128 rows")
    found = figures(case, "sm_100")
    assert found["narrow"] == 0 and found["total"] <= 1.2 and not found["spills"]
