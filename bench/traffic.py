"""Bytes that a kernel moves, counted in Triton's interpreter, by argument.

python bench/traffic.py      the decode kernel at one row of x against the least that has to move
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from bench.interpreter import interpreted, replaced

SECTOR = 32  # bytes that memory moves at least


@dataclass
class Bytes:
    """Bytes of one argument, read or written.

    Attributes:
        useful: Of unmasked elements, as often as they are asked for.
        l2: Of the different sectors that each program touches: traffic of the L2 cache, if a program's own cache is
            perfect.
        dram: Of the different sectors that any program touches: what memory has to move.
    """

    useful: int = 0
    l2: int = 0
    dram: int = 0


@dataclass
class Traffic:
    """What ``counted`` found: bytes by ("load" or "store" or "atomic", name of the argument)."""

    bytes: dict[tuple[str, str], Bytes] = field(default_factory=lambda: defaultdict(Bytes))

    def total(self, name: str) -> int:
        """The sum of "useful", "l2" or "dram" over all arguments."""
        return sum(getattr(moved, name) for moved in self.bytes.values())


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what kernels move inside this block, which is to be inside ``interpreted``."""
    traffic = Traffic()
    program: dict[tuple[str, str], list[Any]] = defaultdict(list)
    everything: dict[tuple[str, str], list[Any]] = defaultdict(list)
    owners: list[tuple[int, int, str]] = []
    builder = {name: getattr(InterpreterBuilder, name) for name in ("create_masked_load", "create_masked_store")}
    atomic, place, arguments = (
        InterpreterBuilder.create_atomic_rmw,
        InterpreterBuilder.set_grid_idx,
        GridExecutor._init_args_hst,
    )

    def record(kind: str, pointers: Any, mask: Any, size: int) -> None:
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        at = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data.astype(bool), shape)]
        if at.size:
            name = next((name for start, end, name in owners if start <= int(at.flat[0]) < end), "?")
            traffic.bytes[kind, name].useful += at.size * size
            program[kind, name].append(np.unique(at // np.uint64(SECTOR)))

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        record("load", pointers, mask, interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)
        return builder["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record("store", pointers, mask, value.data.dtype.itemsize)
        return builder["create_masked_store"](self, pointers, value, mask, *rest)

    def rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record("atomic", pointers, mask, value.data.dtype.itemsize)
        return atomic(self, op, pointers, value, mask, *rest)

    def close_program() -> None:
        for key, sectors in program.items():
            different = np.unique(np.concatenate(sectors))
            traffic.bytes[key].l2 += different.size * SECTOR
            everything[key].append(different)
        program.clear()

    def next_program(self: Any, *index: int) -> None:
        close_program()
        place(self, *index)

    def own(self: Any, values: Any, keywords: Any) -> Any:
        close_program()
        values, keywords = arguments(self, values, keywords)
        owners.clear()
        for name, value in [*zip(self.arg_names, values, strict=False), *keywords.items()]:
            if torch.is_tensor(value):
                storage = value.untyped_storage()
                owners.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), name))
        return values, keywords

    with ExitStack() as stack:
        for owner, name, value in [
            (InterpreterBuilder, "create_masked_load", load),
            (InterpreterBuilder, "create_masked_store", store),
            (InterpreterBuilder, "create_atomic_rmw", rmw),
            (InterpreterBuilder, "set_grid_idx", next_program),
            (GridExecutor, "_init_args_hst", own),
        ]:
            stack.enter_context(replaced(owner, name, value))
        yield traffic
        close_program()
        for key, sectors in everything.items():
            traffic.bytes[key].dram = np.unique(np.concatenate(sectors)).size * SECTOR


def main() -> None:
    """Print a table, then a line of JSON."""
    from plquant.kernels import decode
    from plquant.kernels.layout import pack

    rows = []
    print(f"{'kernel':24s} {'least':>9s} {'useful':>7s} {'L2':>7s} {'DRAM':>7s}   times the least")
    for bits in (2, 3, 4, 5, 6, 8):
        codes = torch.randint(0, 1 << bits, (1024, 1024), dtype=torch.uint8)
        zeros = torch.randint(0, 1 << bits, (1024, 8), dtype=torch.uint8)
        packed = pack(codes, torch.ones(1024, 8, dtype=torch.float16), zeros, bits, 128)
        x = torch.randn(1, 1024).half()
        with interpreted(), counted() as traffic:
            out = decode.linear(x, packed, subnormal=True)
        least = packed.nbytes + x.nbytes + out.nbytes
        ratios = {name: traffic.total(name) / least for name in ("useful", "l2", "dram")}
        rows.append({"kernel": f"decode W{bits} fp16 in", "least": least} | ratios)
        print(f"{rows[-1]['kernel']:24s} {least:9d} " + " ".join(f"{value:7.3f}" for value in ratios.values()))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
