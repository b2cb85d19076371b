"""The launches of the prefill kernel whose machine code is watched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from bench.aot import Case
from plquant.kernels import pairs
from plquant.kernels import prefill_kernel as code
from plquant.kernels.layout import PLANES
from plquant.kernels.prefill import constants

# Greatest numbers of instructions to one matrix instruction for 64 rows. The design asks for 4.5, and for 24 where four
# warps issue one. As measured: codes of two planes take one more instruction for each pair of codes, those of 8 bits in
# bf16 three more; all take two to be exact and scaled before they are multiplied, half of what is above one.
PER_MMA = {
    "fp16": {2: 4.5, 3: 4.8, 4: 4.5, 5: 4.9, 6: 4.9, 8: 4.5},
    "bf16": {2: 4.5, 3: 4.9, 4: 4.5, 5: 5.4, 6: 5.4, 8: 5.9},
}
PER_GROUP_MMA = {
    "fp16": {2: 28, 3: 32, 4: 28, 5: 35, 6: 35, 8: 32},
    "bf16": {2: 28, 3: 34, 4: 30, 5: 38, 6: 38, 8: 42},
}


def cases(target: str) -> Iterator[Case]:
    """Every width and dtype: groups of 128 inputs, asymmetric, tiles of 64 rows; and 32 rows at 4 bits."""
    for bits, dtype in product((2, 3, 4, 5, 6, 8), ("fp16", "bf16")):
        yield case(target, bits, dtype, 64)
    yield case(target, 4, "bf16", 32)


def case(target: str, bits: int, dtype: str, rows: int) -> Case:
    """One launch."""
    capability = int(target[3:]) // 10 if target.startswith("sm_") else 0
    options = constants(bits, rows, capability)
    compiler: dict[str, Any] = {
        name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options
    }
    signature = dict.fromkeys(("words_ptr", "high_ptr"), "*i32:16") | {"rows": "i32"}
    signature |= dict.fromkeys(("scale_ptr", "zero_ptr", "x_ptr", "out_ptr"), f"*{dtype}:16")
    signature |= dict.fromkeys(("in_features", "out_features", "padded_in", "padded_out", "stride_x"), "i32:16")
    weights = 32 * options["W"] * options["K"]
    limits = {"atomics": 0.0, "narrow": 0.0, "conversions": 0.04}
    if rows == 64:
        limits["per_mma"] = (PER_GROUP_MMA if capability in (9, 10) else PER_MMA)[dtype][bits]
    return Case(
        name=f"prefill W{bits} {dtype} {rows} rows",
        kernel=code.prefill_kernel,
        signature=signature,
        constants=options | {"GROUP": 128, "SYMMETRIC": False, "MASKED": False},
        options=compiler,
        weights=weights,
        weight_bytes=weights * sum(PLANES[bits]) // 8,
        loading=(code._load_words,),
        dequantizing=(pairs.fma, pairs.code_pairs, pairs.less, pairs._fields, pairs._byte, pairs._with_exponent),
        bits_per_weight=bits + 32 / 128,
        limits=limits,
    )
