"""The launches of the decode kernel whose machine code is watched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from bench.aot import Case
from plquant.kernels import decode_kernel as code
from plquant.kernels.layout import PLANES

# Instructions of a lane for each weight, groups along the input; groups along the output may take a fifth more in total.
DEQUANTIZATION = {"fp16": {2: 0.60, 3: 1.20, 4: 0.65, 8: 0.55}, "bf16": {4: 0.90}}
TOTAL = {2: 2.1, 3: 2.8, 4: 1.9, 8: 2.5}
DEQUANTIZING = (code._field, code._with_exponent, code._byte, code._fields, code._operand)


def cases(target: str) -> Iterator[Case]:
    """Every width, dtype and kind of group, with the tiles that ``decode.configure`` takes."""
    for bits, dtype, axis in product((2, 3, 4, 5, 6, 8), ("fp16", "bf16"), ("in", "out")):
        yield case(target, bits, dtype, axis)


def case(target: str, bits: int, dtype: str, axis: str, **changes: Any) -> Case:
    """One launch: groups of 128 inputs or 64 outputs, asymmetric, one to eight rows of x."""
    low, high = PLANES[bits]
    along_out = axis == "out"
    constants: dict[str, Any] = {
        "BITS": bits,
        "LOW_BITS": low,
        "HIGH_BITS": high,
        "GROUP": 64 if along_out else 128,
        "ALONG_OUT": along_out,
        "SYMMETRIC": False,
        "SUBNORMAL": dtype == "fp16",
        "MASKED": False,
        "N": 64,
        "M": 8,
        "K": 64 if low == 8 else 128,
        "W": 4,
        "SPLIT": 1,
        "PTX": target.startswith("sm_"),
    }
    constants |= changes
    floats = {name: f"*{dtype}:16" for name in ("scale_ptr", "zero_ptr", "x_ptr", "out_ptr")}
    sizes = {name: "i32:16" for name in ("in_features", "out_features", "stride_x")}
    weights = constants["N"] * constants["K"] * constants["W"]
    limits = {"shuffles": 0.0, "shared_stores": 0.0, "conversions": 0.0, "atomics": 0.0}
    return Case(
        name=f"decode W{bits} {dtype} {axis}" + "".join(f" {key}={value}" for key, value in changes.items()),
        kernel=code.decode_kernel,
        signature={"words_ptr": "*i32:16", "high_ptr": "*i32:16", "rows": "i32", "tiles": "i32"} | floats | sizes,
        constants=constants,
        warps=constants["W"],
        weights=weights,
        weight_bytes=weights * (low + high) // 8,
        loading=(code._load, code._load_words),
        dequantizing=DEQUANTIZING,
        bits_per_weight=bits + 32 / 128,
        limits=limits,
    )
