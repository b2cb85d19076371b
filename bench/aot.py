"""Kernels compiled ahead of time for GPUs that are not there, and what their machine code says about them.

A case is a kernel with the types and constants of one launch; a figure is a number of its machine code. Figures bound a
kernel's time, they do not predict it: latency, clocks and caches are not in them.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # explicitly: triton 3.10 changes the default

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.sass import Instruction, disassemble

LIMITED = ("sm_80", "sm_89", "sm_90", "sm_120")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass(frozen=True)
class Processor:
    """Limits of one multiprocessor, and a part that has many of them; bandwidth in bytes a second, clock in Hz."""

    warps: int
    programs: int
    shared: int
    part: str
    bandwidth: float
    count: int
    clock: float


# From NVIDIA's data sheets and tuning guides; 65,536 registers and 128 lanes issued a cycle everywhere.
PROCESSORS = {
    "sm_80": Processor(64, 32, 164 << 10, "A100 80 GB", 2039e9, 108, 1.41e9),
    "sm_86": Processor(48, 16, 100 << 10, "RTX 3090", 936e9, 82, 1.70e9),
    "sm_89": Processor(48, 24, 100 << 10, "RTX 4090", 1008e9, 128, 2.52e9),
    "sm_90": Processor(64, 32, 228 << 10, "H100", 3350e9, 132, 1.755e9),
    "sm_100": Processor(64, 32, 228 << 10, "B200", 8000e9, 148, 1.85e9),
    "sm_120": Processor(48, 24, 100 << 10, "RTX 5090", 1792e9, 170, 2.41e9),
}


@dataclass(frozen=True)
class Case:
    """A kernel and one way to launch it.

    Attributes:
        name: What is printed.
        kernel: A function of ``triton.jit``.
        signature: Types of the arguments that are no constants: ``"*fp16:16"`` points to fp16 at an address that 16
            divides, ``"i32:16"`` is an integer that 16 divides.
        constants: Values of the others.
        options: Of the compiler: num_warps, num_stages and others.
        weights: That one program takes in one iteration of its main loop; what is counted is divided by it.
        weight_bytes: Of these weights.
        loading: Functions whose loads are of weights.
        dequantizing: Functions whose arithmetic is dequantization.
        bits_per_weight: With scales and zero-points, for the roofline.
        limits: Greatest values allowed, by figure, on the targets in ``LIMITED``. Spills are allowed nowhere.
    """

    name: str
    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    weights: int = 0
    weight_bytes: int = 0
    loading: tuple[JITFunction[Any], ...] = ()
    dequantizing: tuple[JITFunction[Any], ...] = ()
    bits_per_weight: float = 0.0
    limits: dict[str, float] = field(default_factory=dict)


def compiled(case: Case, target: str) -> Any:
    """What triton makes of a case; its ``asm`` holds all stages from "ttir" to "cubin" or "amdgcn"."""
    names = case.kernel.arg_names
    types, attributes = {}, {}
    for index, name in enumerate(names):
        if name in case.constants:
            types[name] = "constexpr"
        else:
            types[name], _, divisor = case.signature[name].partition(":")
            if divisor:
                attributes[(index,)] = [["tt.divisibility", int(divisor)]]
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, types, constexprs=constants, attrs=attributes)
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    with triton.knobs.cache.scope():
        # Cached machine code names the files it was made from: another checkout's would not be found in this one.
        checkout = hashlib.sha256(__file__.encode()).hexdigest()[:12]
        triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / checkout)
        return triton.compile(source, target=gpu, options=case.options)


def figures(case: Case, target: str) -> dict[str, Any]:
    """Compile a case and read its machine code.

    Returns:
        registers, spills, shared (bytes) and mma (matrix instructions of the main loop by opcode) for every target; and
        for NVIDIA's: occupancy; atomics; in the main loop, or the whole kernel if it has none: per_mma, instructions to
        one matrix instruction; and, in the main loop, in instructions of a lane for each weight: dequantization,
        arithmetic, total, and what weights should be spared, shuffles, shared_stores, conversions to floating point;
        narrow, the share of weight bytes that loads of less than 128 bits take; missed, the share of weight bytes whose
        loads were not found, or were found twice; in_flight, the bytes of weights that all programs of a multiprocessor
        load in one iteration; idle, 1 where less than 40% is occupied and less than 16 KB
        in flight; roofline, the share of the part's memory bandwidth that the instructions leave room for.
    """
    binary = compiled(case, target)
    if not target.startswith("sm_"):
        return _amd_figures(binary.asm["amdgcn"], binary.metadata.shared)
    program = disassemble(binary.asm["cubin"])
    shared = max(program.shared, binary.metadata.shared)
    occupancy, programs = _occupancy(target, program.registers, shared, case.options["num_warps"])
    spills = sum(i.kind == "spill" for i in program.instructions)
    found: dict[str, Any] = {"registers": program.registers, "spills": spills, "shared": shared, "occupancy": occupancy}
    loop = program.main_loop() or program.instructions
    found["mma"] = dict(Counter(i.opcode for i in loop if i.kind == "mma"))
    if found["mma"]:
        found["per_mma"] = len(loop) / sum(found["mma"].values())
    found["atomics"] = sum(i.kind == "atomic" for i in program.instructions)
    if case.weights:
        found |= _per_weight(case, loop, programs)
        found["idle"] = float(occupancy < 0.4 and found["in_flight"] < 16384)
        found["roofline"] = _roofline(target, found["total"], case.bits_per_weight)
    return found


def _per_weight(case: Case, loop: list[Instruction], programs: int) -> dict[str, Any]:
    lanes = 32 * case.options["num_warps"]
    dequantizing, loading = Lines(case.dequantizing), Lines(case.loading)

    def per_weight(instructions: list[Instruction]) -> float:
        return len(instructions) * lanes / case.weights

    arithmetic = [i for i in loop if i.kind in ("arithmetic", "convert")]
    on_weights = [i for i in loop if dequantizing.contains(i) or loading.contains(i)]
    loads = [i for i in loop if i.kind == "load" and loading.contains(i)]
    loaded = sum(i.load_bits for i in loads)
    return {
        "dequantization": per_weight([i for i in arithmetic if dequantizing.contains(i)]),
        "arithmetic": per_weight(arithmetic),
        "total": per_weight(loop),
        "shuffles": per_weight([i for i in on_weights if i.kind == "shuffle"]),
        "shared_stores": per_weight([i for i in on_weights if i.kind == "shared store"]),
        "conversions": per_weight([i for i in on_weights if i.base in ("I2F", "I2FP", "I2I")]),
        "missed": abs(1 - loaded // 8 * lanes / max(1, case.weight_bytes)),
        "narrow": sum(i.load_bits for i in loads if i.load_bits < 128) / max(1, loaded),
        "in_flight": programs * case.weight_bytes,
    }


class Lines:
    """The source lines of functions."""

    def __init__(self, functions: tuple[JITFunction[Any], ...]) -> None:
        self.ranges = []
        for function in functions:
            lines, start = inspect.getsourcelines(function.fn)
            self.ranges.append((inspect.getsourcefile(function.fn), start, start + len(lines)))

    def contains(self, instruction: Instruction) -> bool:
        """Whether an instruction comes from one of the lines."""
        return any(file == instruction.file and start <= instruction.line < end for file, start, end in self.ranges)


def _occupancy(target: str, registers: int, shared: int, warps: int) -> tuple[float, int]:
    """Share of the warps that a multiprocessor holds, and the number of programs."""
    processor = PROCESSORS[target]
    by_registers = 65536 // (math.ceil(registers * 32 / 256) * 256) // warps
    programs = min(processor.programs, processor.warps // warps, by_registers, processor.shared // (shared + 1024))
    return programs * warps / processor.warps, programs


def _roofline(target: str, instructions: float, bits: float) -> float:
    processor = PROCESSORS[target]
    weights_per_cycle = processor.bandwidth * 8 / bits / processor.count / processor.clock
    return min(1.0, 128 / (instructions * weights_per_cycle))


def _amd_figures(assembly: str, shared: int) -> dict[str, Any]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, f"no {name} in the assembly"
        return int(found[1])

    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    mma = Counter(re.findall(r"^\s+(v_mfma\w+)", assembly, flags=re.MULTILINE))
    return {"registers": number("vgpr_count"), "spills": spills, "shared": shared, "mma": dict(mma)}


def violations(case: Case, target: str, found: dict[str, Any]) -> Iterator[str]:
    """The limits that a kernel does not keep, in words."""
    limits = {"spills": 0.0} | (case.limits if target in LIMITED else {})
    for name, limit in limits.items():
        if name in found and found[name] > limit:
            yield f"{case.name} on {target}: {name} {found[name]:.3f}, limit {limit}"
