"""Who may import whom."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "plquant"
# A module may import those of its own entry's value, and its own folder. What is not named is at the top.
BELOW = {
    "files": [],
    "evaluating": [],
    "bfloat16": [],
    "finite": ["bfloat16", "evaluating"],
    "native": [],
    "quant": ["native"],
    "kernels": ["native"],
    "transforms": ["quant"],
    "formats": ["files", "quant"],
    "nn": ["quant", "transforms", "formats", "kernels"],
    "architectures": [],
    "blocks": ["bfloat16", "distributed", "evaluating", "quant", "transforms", "nn", "architectures"],
    "parts": ["quant", "transforms", "nn", "blocks"],
    "block_module": ["bfloat16", "quant", "nn", "blocks", "parts", "distributed"],
    "methods": ["blocks", "parts", "block_module"],
    "block_checkpoint": ["files"],
    "distributed": [],
    "quiet": [],
    "garbage": [],
    "sign_sgd": [],
    "recipe": ["", "quant", "data", "parts", "block_module", "model"],
    "data": ["evaluating"],
    "callbacks": ["block_module"],
    "plan": ["quant", "formats", "block_module", "report", "trial"],
    "trial": ["quant", "nn", "blocks", "parts", "report"],
    "perplexity": [],
    "tasks": ["bfloat16", "model"],
    "weight_files": [],
    "partial_load": [],
    "sources": ["weight_files", "partial_load"],
    "manifest": ["files"],
    "run_folder": ["files", "formats", "manifest"],
    "packed_model": ["architectures", "quant", "formats", "nn"],
    "report": ["files", "quant", "nn", "perplexity", ""],
    "model": [
        *["architectures", "quant", "formats", "blocks", "block_module"],
        *["perplexity", "sources", "run_folder", "packed_model"],
    ],
    "perplexity_trainer": ["bfloat16", "data", "distributed", "files", "model", "perplexity", "quiet", "tasks"],
    "trainer": [
        *[
            "",
            "quant",
            "nn",
            "blocks",
            "block_module",
            "block_checkpoint",
            "data",
            "distributed",
            "formats",
            "model",
            "callbacks",
        ],
        *["finite", "garbage", "manifest", "plan", "quiet", "recipe", "report", "run_folder"],
        *["perplexity_trainer", "trial"],
    ],
}
PURE = {"quant", "transforms", "kernels"}  # never lightning or transformers
MODULES = sorted(p for p in PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_lower_layers_never_name_upper_ones(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    layer = parts[0]
    if layer in PURE:
        assert not {name.split(".")[0] for name in imports(path)} & {"lightning", "transformers"}
    if layer in BELOW:
        ours = {name.partition(".")[2].split(".")[0] for name in imports(path) if name.split(".")[0] == "plquant"}
        assert ours <= {*BELOW[layer], layer}


def test_no_file_over_500_lines() -> None:
    root = PACKAGE.parent
    long = [
        p
        for folder in ("plquant", "bench")
        for p in (root / folder).rglob("*.py")
        if len(p.read_text().splitlines()) > 500
    ]
    assert not long
