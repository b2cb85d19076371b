"""Machine code of NVIDIA GPUs: disassembled with the tools in triton's wheel, classified, its main loop found."""

from __future__ import annotations

import linecache
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@\S+)\s+)?(\S+)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+):")
_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')

# The pipes of a scheduler. What belongs to none of them (a new instruction) is "other" and counts as arithmetic.
CLASSES = {
    "mma": "HMMA IMMA QMMA OMMA HGMMA IGMMA QGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "load": "LDG LDGSTS LD UTMALDG UBLKCP",
    "store": "STG ST UTMASTG",
    "atomic": "RED REDG ATOM ATOMG UTMAREDG",
    "shared load": "LDS LDSM",
    "shared store": "STS STSM",
    "spill": "LDL STL",
    "shuffle": "SHFL MOVM",
    "control": "BRA EXIT BSSY BSYNC NOP CALL RET WARPSYNC YIELD BREAK BMOV",
    "synchronize": "BAR DEPBAR LDGDEPBAR SYNCS WARPGROUP WARPGROUPSET MEMBAR FENCE ERRBAR CCTL ARRIVES ELECT LDTM STTM",
    "convert": "I2F I2FP F2I F2F F2FP I2I F2IP I2IP",
}
_CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Instruction:
    """One line of machine code; ``file`` and ``line`` are the innermost source position."""

    address: int
    opcode: str
    operands: str
    file: str
    line: int

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """The class of the opcode: a key of ``CLASSES``, "uniform" (once a warp, on its own pipe) or "arithmetic"."""
        if self.base in _CLASS_OF:
            return _CLASS_OF[self.base]
        return "uniform" if self.base.startswith("U") else "arithmetic"

    @property
    def load_bits(self) -> int:
        """Bits that a load takes for each lane."""
        width = re.search(r"\.(128|64|[US]16|[US]8)(?:\.|$)", self.opcode)
        return int(width[1].strip("US")) if width else 32


@dataclass(frozen=True)
class Program:
    """A kernel's machine code and what it occupies."""

    instructions: list[Instruction]
    labels: dict[str, int]
    registers: int
    stack: int
    shared: int

    def main_loop(self) -> list[Instruction]:
        """The smallest loop with the most matrix instructions, or else with the most loads; [] if there is no loop."""
        loops = []
        for jump in self.instructions:
            target = re.search(r"`\((\.\w+)\)", jump.operands) if jump.base == "BRA" else None
            start = self.labels.get(target[1], jump.address) if target else jump.address
            if start < jump.address:
                loops.append([i for i in self.instructions if start <= i.address <= jump.address])

        def weight(loop: list[Instruction]) -> tuple[int, int, int]:
            kinds = [i.kind for i in loop]
            return kinds.count("mma"), kinds.count("load") + kinds.count("shared load"), -len(loop)

        return max(loops, key=weight, default=[])


def disassemble(cubin: bytes) -> Program:
    """The program in a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _tool("nvdisasm", "-c", "-g", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    position = ("", 0)
    for row in text.splitlines():
        if found := _LINE.search(row):
            position = (found[1], int(found[2]))
        elif found := _LABEL.match(row.strip()):
            waiting.append(found[1])
        elif found := _INSTRUCTION.search(row):
            address = int(found[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            instructions.append(_in_source(Instruction(address, found[3], found[4], *position)))
    counts = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert counts is not None and instructions, "the disassembler printed something else"
    return Program(instructions, labels, *map(int, counts.groups()))


def _in_source(instruction: Instruction) -> Instruction:
    """A load on the line of its ``tl.load``.

    Triton makes loads of inline assembly that clears each register first, a line each, and LLVM counts these lines on.
    """
    for ahead in (instruction.load_bits // 32, 0) if instruction.kind == "load" else ():
        if ".load(" in linecache.getline(instruction.file, instruction.line - ahead):
            return replace(instruction, line=instruction.line - ahead)
    return instruction


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
