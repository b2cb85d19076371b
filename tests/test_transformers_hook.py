"""``from_pretrained`` after ``import plquant``: our folders with our kernels, others as ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import plquant as pq
from plquant.nn.packed_linear import PackedLinear
from plquant.quant.grid import ActivationGrid
from tests.families import stock
from tests.test_packed_model import IDS, by_name, logits, packed, save

ORDERS = {
    "plquant first": "import plquant\nassert 'transformers' not in sys.modules\nimport transformers",
    "transformers first": "import transformers\nimport plquant",
    "all of transformers first": "from transformers import AutoModelForCausalLM, PreTrainedModel\nimport plquant",
}


def linears(lm: torch.nn.Module) -> list[PackedLinear]:
    return [module for module in lm.modules() if isinstance(module, PackedLinear)]


def test_our_folders_run_from_their_integers(tmp_path: Path) -> None:
    activations = ActivationGrid(8, kv=4)
    folder = save(packed(grid_of=by_name, activations=activations, online=True), tmp_path / "out", activations)
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), pq.load(folder)
    assert len(linears(theirs)) == len(linears(ours)) > 0
    assert [m.prepared for m in linears(theirs)] == [m.prepared for m in linears(ours)]
    assert torch.equal(logits(theirs), logits(ours))
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(wide), logits(pq.load(folder, dtype=torch.float32)))


def test_folders_of_others_and_whoever_asks_get_transformers_own(tmp_path: Path) -> None:
    folder = save(packed(), tmp_path / "out")
    assert not linears(stock(folder))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["plquant"]
    (folder / "config.json").write_text(json.dumps(config))
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert not linears(lm) and lm(IDS).logits.shape[:2] == IDS.shape


@pytest.mark.parametrize("order", ORDERS)
def test_whichever_is_imported_first(order: str, tmp_path: Path) -> None:
    folder = save(packed(), tmp_path / "out")
    code = f"""
import sys
{ORDERS[order]}
from transformers import AutoModelForCausalLM
lm = AutoModelForCausalLM.from_pretrained({str(folder)!r})
print(sorted({{type(m).__name__ for m in lm.modules() if "Linear" in type(m).__name__}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PackedLinear" in done.stdout
