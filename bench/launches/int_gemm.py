"""The launches of the integer kernel whose machine code is watched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from bench.aot import Case
from plquant.kernels import int_gemm_kernel as code
from plquant.kernels.int_gemm import configure

# Greatest numbers of instructions to one matrix instruction for 128 rows. Those that four warps issue together are 32
# times as large.
PER_MMA = {False: 2.2, True: 5.0}
PER_GROUP_MMA = {False: 20.0, True: 31.0}
CAPABILITY = {"sm_90": 9, "sm_100": 10}  # major; where it matters


def cases(target: str) -> Iterator[Case]:
    """Codes of 8 and of 4 bits, the tile of each number of rows, both zero-points."""
    groups = target in ("sm_90", "sm_100")
    for packed, rows in product((False, True), (16, 64, 128)):
        config = configure(rows, packed, CAPABILITY.get(target, 8))
        constants = {
            "PACKED": packed,
            "X_ZERO": True,
            "W_ZERO": True,
            "MASKED": False,
            "M": config.rows,
            "N": config.outputs,
            "K": config.inputs,
            "STAGES": config.stages,
            "KEEP": target.startswith("sm_") and not groups,
            "PTX": target.startswith("sm_"),
        }
        codes = {name: "*i8:16" for name in ("x_ptr", "w_ptr")}
        floats = {name: "*fp32:16" for name in ("x_scale_ptr", "w_scale_ptr")}
        integers = {"x_zero_ptr": "*i32", "x_sum_ptr": "*i32", "w_zero_ptr": "*i32:16", "w_sum_ptr": "*i32:16"}
        sizes = {name: "i32:16" for name in ("in_features", "out_features", "stride_x", "stride_w")}
        limits = {"atomics": 0.0, "narrow": 0.0}
        if rows == 128:
            limits["per_mma"] = (PER_GROUP_MMA if groups else PER_MMA)[packed]
        weights = config.outputs * config.inputs
        yield Case(
            name=f"int gemm W{4 if packed else 8} {rows} rows",
            kernel=code.int_gemm_kernel,
            signature={"out_ptr": "*bf16:16", "rows": "i32"} | codes | floats | integers | sizes,
            constants=constants,
            options={"num_warps": config.warps, "num_stages": config.stages},
            weights=weights,
            weight_bytes=weights // 2 if packed else weights,
            loading=(code.int_gemm_kernel,),
            dequantizing=(code._nibbles,),
            bits_per_weight=4.0 if packed else 8.0,
            limits=limits,
        )
