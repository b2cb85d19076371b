"""The launches of the decode kernel whose machine code is watched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from bench.aot import Case
from plquant.kernels import decode_kernel as code
from plquant.kernels.decode import compiler_options
from plquant.kernels.layout import PLANES

# Greatest numbers of instructions of a lane for each weight. The design asks for a dequantization of 0.60, 1.20, 0.65
# and 0.55 for 2, 3, 4 and 8 bits in fp16, 0.90 for 4 bits in bf16. Fewer fields of bf16 are where they can be used,
# and 8 bits are two fields there: 0.69, 1.44 and 1.26 measured for 2, 3 and 8 bits. 5 and 6 bits: as measured.
DEQUANTIZATION = {
    "fp16": {2: 0.60, 3: 1.20, 4: 0.65, 5: 1.40, 6: 1.40, 8: 0.55},
    "bf16": {2: 0.70, 3: 1.46, 4: 0.90, 5: 1.87, 6: 1.84, 8: 1.27},
}
# In total the design asks for 2.1, 2.8, 1.9 and 2.5 for 2, 3, 4 and 8 bits; the greatest measured are 1.46, 2.25, 1.50,
# 2.50, 2.47 and 2.43, all with groups along the input.
TOTAL = {2: 1.6, 3: 2.4, 4: 1.6, 5: 2.6, 6: 2.6, 8: 2.5}
DEQUANTIZING = (code._field, code._with_exponent, code._byte, code._fields, code._operand)


WIDTHS = (2, 3, 4, 5, 6, 8)


def cases(target: str) -> Iterator[Case]:
    """Every width, dtype and kind of group; then, unbounded but for spills, other modes and tiles."""
    for bits, dtype, axis in product(WIDTHS, ("fp16", "bf16"), ("in", "out")):
        yield case(target, bits, dtype, axis)
    for bits, axis in product(WIDTHS, ("in", "out")):
        yield case(target, bits, "fp16", axis, N=32, M=16, MASKED=True, SUBNORMAL=False)
    for bits in WIDTHS:
        yield case(target, bits, "bf16", "in", GROUP=32, W=8)
        yield case(target, bits, "fp16", "in", GROUP=0, SYMMETRIC=True)
    # a function of plain sums: nothing to bound
    arguments = {"parts_ptr": "*fp32:16", "out_ptr": "*fp16:16", "size": "i32:16"}
    yield Case("decode sums", code.sum_splits_kernel, arguments, {"SPLIT": 8, "BLOCK": 1024}, {"num_warps": 4})


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
        "M": 8 if target.startswith("sm_") else 16,
        "K": 64 if low == 8 else 128,
        "W": 4,
        "SPLIT": 1,
        "PTX": target.startswith("sm_"),
    }
    constants |= changes
    constants["SPAN"] = constants["K"] if along_out else math.gcd(constants["GROUP"], constants["K"])
    floats = {name: f"*{dtype}:16" for name in ("scale_ptr", "zero_ptr", "x_ptr", "out_ptr")}
    sizes = {name: "i32:16" for name in ("in_features", "out_features", "stride_x")}
    weights = constants["N"] * constants["K"] * constants["W"]
    limits = {
        **dict.fromkeys(("shuffles", "shared_stores", "conversions", "atomics", "idle", "missed"), 0.0),
        "narrow": 0.05,
    }
    if bits == 2 and along_out and constants["M"] == 16 and not constants["SUBNORMAL"]:
        limits["idle"] = 1.0  # 12 KB in flight: with registers for more warps it spills on sm_100
    if not changes:
        limits |= {"dequantization": DEQUANTIZATION[dtype][bits], "total": TOTAL[bits]}
    return Case(
        name=f"decode W{bits} {dtype} {axis}" + "".join(f" {key}={value}" for key, value in changes.items()),
        kernel=code.decode_kernel,
        signature={"words_ptr": "*i32:16", "high_ptr": "*i32:16", "rows": "i32", "tiles": "i32", "gain": "fp32"}
        | floats
        | sizes,
        constants=constants,
        options=compiler_options(constants),
        weights=weights,
        weight_bytes=weights * (low + high) // 8,
        loading=(code._load_words,),
        dequantizing=DEQUANTIZING,
        bits_per_weight=bits + 32 / 128,
        limits=limits,
    )
