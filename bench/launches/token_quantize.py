"""The launches of the quantization of tokens whose machine code is watched."""

from __future__ import annotations

from collections.abc import Iterator

from bench.aot import Case
from plquant.kernels import token_quantize_kernel as code
from plquant.kernels.token_quantize import constants

WIDTH = 4096


def cases(target: str) -> Iterator[Case]:
    """Rows of 4096 channels: alone, after a norm, and after a norm, a gather of two sources and a rotation."""
    for name, norm, most, hadamard in (
        ("", False, 0, 0),
        (" norm", True, 0, 0),
        (" norm gather hadamard", True, 2, 128),
    ):
        options = constants(8, False, WIDTH, WIDTH, most, hadamard)
        warps = options.pop("num_warps")
        signature = {name: "*bf16:16" for name in ("x_ptr", "gain_ptr")}
        signature |= {
            "sources_ptr": "*i32:16",
            "offset_ptr": "*fp32:16",
            "clip_ptr": "*fp32:16",
            "codes_ptr": "*i8:16",
            "scale_ptr": "*fp32:16",
        }
        signature |= {"zero_ptr": "*i32", "sum_ptr": "*i32", "eps": "fp32"}
        yield Case(
            name=f"token quantize{name}",
            kernel=code.token_quantize_kernel,
            signature=signature | {size: "i32:16" for size in ("stride_x", "stride_out", "width", "width_out")},
            constants=options | {"NORM": norm, "OFFSET": False, "CLIP": False},
            options={"num_warps": warps, "num_stages": 1},
            weights=WIDTH,
            weight_bytes=2 * WIDTH,
            loading=() if most else (code.token_quantize_kernel, code._channels),
            bits_per_weight=24.0,  # bf16 read, a code written
            limits={"atomics": 0.0, "narrow": 0.0},
        )
