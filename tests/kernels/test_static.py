"""What the machine code of every kernel must hold, on GPUs that need not be there."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from bench.aot import TARGETS, figures, violations
from bench.launches import decode
from bench.static import cases


def broken(target: str, prefix: str = "") -> list[str]:
    return [
        violation
        for case in cases(target)
        if case.name.startswith(prefix)
        for violation in violations(case, target, figures(case, target))
    ]


@pytest.mark.parametrize("bits", [2, 4])
def test_limits_hold_on_one_target(bits: int) -> None:
    for dtype in ("fp16", "bf16"):
        case = decode.case("sm_80", bits, dtype, "in")
        assert not list(violations(case, "sm_80", figures(case, "sm_80")))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_limits_hold_on_every_target(target: str) -> None:
    assert not broken(target)


def test_a_kernel_that_does_too_much_is_found_out() -> None:
    """Fields of bf16 moved down one by one, as if LLVM were left to it."""
    case = decode.case("sm_80", 4, "bf16", "in", PTX=False)
    found = list(violations(case, "sm_80", figures(case, "sm_80") | {"spills": 7}))
    assert any("spills 7" in text for text in found)
    case = decode.case("sm_80", 4, "bf16", "in")
    case.limits["dequantization"] = 0.5
    assert any("dequantization 0.8" in text for text in violations(case, "sm_80", figures(case, "sm_80")))


def test_what_a_register_budget_spills_is_counted() -> None:
    case = decode.case("sm_80", 4, "fp16", "in")
    case.options["maxnreg"] = 64
    found = figures(case, "sm_80")
    assert found["registers"] <= 64
    assert found["spills"] > 10
