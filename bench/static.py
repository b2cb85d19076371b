"""Compile every kernel for every GPU, none needed, and hold its machine code to limits.

python bench/static.py                      all kernels, all targets; a table, then a line of JSON
python bench/static.py --targets sm_90 --only decode

"instr" are instructions of a lane for each weight in the main loop. "DRAM" is the share of the part's memory bandwidth
that the instruction stream leaves room for, which bounds what a kernel can reach and does not predict it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench.launches
from bench.aot import TARGETS, Case, figures, violations

COLUMNS = {  # figure: heading, format
    "registers": ("regs", "4d"),
    "spills": ("spills", "6d"),
    "shared": ("shared", "6d"),
    "occupancy": ("occupancy", "9.0%"),
    "in_flight": ("in flight", "9d"),
    "dequantization": ("dequant", "7.2f"),
    "total": ("instr", "5.2f"),
    "per_mma": ("per mma", "7.2f"),
    "shuffles": ("shfl", "4.2f"),
    "shared_stores": ("sts", "4.2f"),
    "narrow": ("narrow", "6.0%"),
    "roofline": ("DRAM", "5.0%"),
}


def cases(target: str) -> Iterator[Case]:
    """The launches that each file of ``bench/launches`` names."""
    for module in pkgutil.iter_modules(bench.launches.__path__):
        yield from importlib.import_module(f"bench.launches.{module.name}").cases(target)


def main() -> int:
    """Print; the exit code says whether a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--only", default="", help="cases whose name starts with this")
    options = parser.parse_args()
    heads = " ".join(
        f"{head:>{max(len(head), int(form.split('.')[0].rstrip('d')))}s}" for head, form in COLUMNS.values()
    )
    print(f"{'kernel':40s} {'target':7s} {heads}  matrix instructions")
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    for target in options.targets:
        for case in cases(target):
            if case.name.startswith(options.only):
                found = figures(case, target)
                broken += violations(case, target, found)
                rows.append({"kernel": case.name, "target": target} | found)
                print(f"{case.name:40s} {target:7s} {_row(found)}", flush=True)
    print(*broken, sep="\n")
    print(json.dumps({"rows": rows, "broken": broken}))
    return bool(broken)


def _row(found: dict[str, Any]) -> str:
    cells = []
    for name, (head, form) in COLUMNS.items():
        value = found.get(name)
        text = "" if value is None else f"{value:{form}}"
        cells.append(f"{text:>{max(len(head), int(form.split('.')[0].rstrip('d')))}s}")
    return " ".join(cells) + "  " + ", ".join(f"{count} {opcode}" for opcode, count in found["mma"].items())


if __name__ == "__main__":
    sys.exit(main())
