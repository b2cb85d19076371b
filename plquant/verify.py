"""Whether the folder of a finished run holds what the run wrote, and whether that runs: ``plquant verify OUT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plquant.formats.checkpoint import INDEX, packed_linears, predicted_bytes, tensor_names
from plquant.formats.quantization_config import grids_of
from plquant.manifest import MANIFEST, damaged_files, read_manifest
from plquant.methods.rtn import RTN
from plquant.model import QuantizedLM
from plquant.nn.packed_linear import PackedLinear
from plquant.quant.grid import IntGrid

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 16  # of the forward pass
EQUIVALENT = 1e-5  # norms compute in fp32, and matrices are inverted
ZERO_POINT = "weight_zero_point"
WORDS = ("weight_packed", "weight_scale", ZERO_POINT)  # tensors of a packed linear


@dataclass(frozen=True)
class Check:
    """What was looked at, and what was found.

    Attributes:
        name: What was looked at.
        passed: It is as it should be; ``None`` if that could not be found out.
        found: A sentence.
    """

    name: str
    passed: bool | None
    found: str


def verify(folder: str | Path) -> list[Check]:
    """Check the output folder of a finished run.

    Raises:
        ValueError: The folder is no such.
    """
    path = Path(folder)
    missing = [name for name in ("config.json", INDEX, MANIFEST) if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}: give the output folder of a finished run")
    checks = [_attempt("files", lambda: _files(path))]
    if not checks[0].passed:  # what is damaged is not loaded
        return checks + [Check(name, None, "not looked at") for name in ("transforms", "linears", "size", "run time")]
    model = QuantizedLM(str(path), RTN)
    checks += [
        _attempt("transforms", lambda: _transforms(path)),
        _attempt("linears", lambda: _linears(path, model)),
        _attempt("size", lambda: _size(path, model)),
    ]
    return [*checks, _attempt("run time", lambda: _run_time(path, model.lm))]


def _attempt(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(name, *check())
    except (ValueError, OSError, KeyError) as error:
        return Check(name, False, str(error) or repr(error))


def _files(folder: Path) -> tuple[bool, str]:
    manifest = read_manifest(folder)
    damaged = damaged_files(folder, manifest)
    tensors = sum(map(len, manifest["tensors"].values()))
    return not damaged, "; ".join(damaged) or f"{len(manifest['files'])} files, {tensors} tensors as they were written"


def _transforms(folder: Path) -> tuple[bool, str]:
    """What the run measured on each block: its transforms, with nothing rounded, leave the output where it was."""
    found = {name: error for name, error in read_manifest(folder)["made"]["equivalence"].items() if error is not None}
    if not found:
        return True, "none, or rounded to nearest in every block"
    worst = max(found, key=lambda name: found[name])
    said = f"{len(found)} blocks; greatest relative change of an output before rounding"
    return found[worst] <= EQUIVALENT, f"{said} {found[worst]:.1e} ({worst}), at most {EQUIVALENT:.0e}"


def _linears(folder: Path, model: QuantizedLM) -> tuple[bool, str]:
    """Every linear of a block is quantized; every other one is on the list of exceptions."""
    shapes, _ = model.linear_shapes()
    packed, excepted = set(packed_linears(tensor_names(folder))), set(model.config.quantization_config["ignore"])
    wrong = [f"{name} is not quantized" for name in shapes.keys() - packed]
    wrong += [f"{name} is quantized, which the model has no such linear for" for name in packed - shapes.keys()]
    wrong += [f"{name} is quantized and on the list of exceptions" for name in packed & excepted]
    said = f"{len(packed)} quantized; in floating point: {', '.join(sorted(excepted)) or 'none'}"
    return not wrong, "; ".join(sorted(wrong)) or said


def _size(folder: Path, model: QuantizedLM) -> tuple[bool, str]:
    """The bytes of all tensors are those that the shapes and grids foretell."""
    shapes, parameters = model.linear_shapes()
    grids = grids_of(model.config.quantization_config, shapes)
    rest = parameters - sum(out * width for out, width in shapes.values())
    expected = predicted_bytes(shapes, grids, rest, model.load_dtype)
    beside, total = 0, 0  # of run-time operations and input quantizers, which shapes do not tell
    for name, nbytes in _tensor_bytes(folder):
        total += nbytes
        beside += nbytes if ".online." in name or ".inputs." in name else 0
    text = f"{total:,} bytes of tensors, {expected:,} foretold"
    return total == expected + beside, text + (f" and {beside:,} of run-time operations" if beside else "")


def _tensor_bytes(folder: Path) -> Iterator[tuple[str, int]]:
    from safetensors import safe_open

    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name).nbytes


@torch.no_grad()
def _run_time(folder: Path, lm: PreTrainedModel) -> tuple[bool, str]:
    """Every packed linear gives what its codes, decoded by plain arithmetic, give on the input that it gets."""
    errors: dict[str, float] = {}
    stored = _stored(folder)

    def compare(name: str, linear: PackedLinear, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0] if linear.online is None else linear.online(args[0])
        x = x if linear.inputs is None else linear.inputs(x)
        tensors = {key: stored(f"{name}.{key}") for key in WORDS if key != ZERO_POINT or not linear.grid.symmetric}
        weight = decoded(tensors, linear.grid, linear.out_features, linear.in_features)
        weight = weight.to(linear.scale_dtype).to(x.device, x.dtype)
        expected = F.linear(x, weight, None if linear.bias is None else linear.bias.to(x.dtype)).double()
        difference = (output.double() - expected).norm() / expected.norm().clamp(min=1e-30)
        errors[name] = float(difference) if difference.isfinite() else float("inf")

    packed = {name: module for name, module in lm.named_modules() if isinstance(module, PackedLinear)}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: compare(name, m, args, out))
        for name, module in packed.items()
    ]
    vocabulary = lm.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    logits = lm(ids.to(lm.device), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    if not logits.isfinite().all():
        return False, "logits are not finite"
    bound = 8 * torch.finfo(logits.dtype).eps  # sums of another order
    worst = max(errors, key=lambda name: errors[name])
    said = (
        f"{len(errors)} of {len(packed)} linears ran on {TOKENS} tokens; greatest relative difference from the decoded"
    )
    return errors[worst] <= bound, f"{said} codes {errors[worst]:.1e} ({worst}), at most {bound:.1e}"


def _stored(folder: Path) -> Callable[[str], Tensor]:
    """Reads a tensor of the folder by its name."""
    from safetensors import safe_open

    files = [safe_open(shard, "pt") for shard in sorted(folder.glob("*.safetensors"))]
    holder = {name: file for file in files for name in file.keys()}
    return lambda name: holder[name].get_tensor(name)


def decoded(tensors: Mapping[str, Tensor], grid: IntGrid, outputs: int, inputs: int) -> Tensor:
    """A weight [O, I], fp64, from its words by shifts: (code - zero-point) scale, with none of the loader's code.

    Args:
        tensors: Those of ``WORDS``, as they are in the checkpoint.
        grid: Their grid.
        outputs: O.
        inputs: I.
    """
    bits, scale = grid.bits, tensors["weight_scale"].double()
    codes = _fields(tensors["weight_packed"], bits)[:, :inputs].double()
    if grid.symmetric:
        zero_point: Tensor | float = float(1 << (bits - 1))
    elif grid.axis == "in":
        zero_point = _fields(tensors[ZERO_POINT].t(), bits)[:, :outputs].t().double()
    else:
        zero_point = tensors[ZERO_POINT].double() + (1 << (bits - 1))
    dim = 1 if grid.axis == "in" else 0
    size = codes.shape[dim] // scale.shape[dim]
    offset = zero_point.repeat_interleave(size, dim) if isinstance(zero_point, Tensor) else zero_point
    return (codes - offset) * scale.repeat_interleave(size, dim)


def _fields(words: Tensor, bits: int) -> Tensor:
    """int32 [R, W] -> the unsigned fields in them, the first in the lowest bits, [R, W (32 // bits)]."""
    shifts = torch.arange(0, 32 // bits * bits, bits, device=words.device)
    return ((words.long()[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def main(args: list[str]) -> int:
    """Check a folder, print a table.

    Returns:
        0 if all checks passed, 1 if one failed, 2 if there is nothing to check.
    """
    parser = argparse.ArgumentParser("plquant verify", description=verify.__doc__)
    parser.add_argument("folder", help="output folder of a finished run")
    folder = parser.parse_args(args).folder
    try:
        checks = verify(folder)
    except ValueError as error:
        print(f"plquant: error: {error}", file=sys.stderr)
        return 2
    _print(folder, checks)
    return 0 if all(check.passed for check in checks) else 1


def _print(folder: str, checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(folder), show_lines=True)
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    words: dict[Any, str] = {True: "ok", False: "FAILED", None: "-"}
    for check in checks:
        table.add_row(check.name, words[check.passed], check.found)
    Console().print(table)
