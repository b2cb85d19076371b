"""The launches of the Kronecker operation whose machine code is watched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from bench.aot import Case
from plquant.kernels import kronecker_kernel as code
from plquant.kernels.kronecker import sizes


def cases(target: str) -> Iterator[Case]:
    """Rows of 4096 and 16384 channels, plain and with 4-bit codes."""
    for order, quantize in product((64, 128), (False, True)):
        options = sizes(order, order)
        warps = options.pop("num_warps")
        signature = {name: "*bf16:16" for name in ("x_ptr", "left_ptr", "right_ptr")}
        signature |= {
            "out_ptr": "*i8:16" if quantize else "*bf16:16",
            "offset_ptr": "*fp32:16",
            "scale_ptr": "*fp32:16",
        }
        signature |= {name: "*i32" for name in ("zero_ptr", "sum_ptr")} | {"factor": "fp32"}
        signature |= {name: "i32:16" for name in ("stride_x", "stride_out", "n1", "n2")}
        grid = {"QMIN": -8, "QMAX": 7, "SYMMETRIC": False}
        yield Case(
            name=f"kronecker {order} x {order}{' quantize' if quantize else ''}",
            kernel=code.kronecker_kernel,
            signature=signature,
            constants={"QUANTIZE": quantize, "OFFSET": False} | grid | options,
            options={"num_warps": warps, "num_stages": 1},
            weights=order * order,
            weight_bytes=2 * order * order,
            bits_per_weight=24.0 if quantize else 32.0,
            limits={"atomics": 0.0},
        )
