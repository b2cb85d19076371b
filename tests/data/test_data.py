"""All text sources alike: built from flags, recorded, documented, quick to import."""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

import plquant.data
from plquant.data import FileText, HubText, SelfGenerated, TextData, TokenIds
from tests.data.given import GivenText, write


@pytest.mark.parametrize("name", ["BuiltinText", "FileText", "HubText", "SelfGenerated"])
def test_every_source_is_built_from_flags_and_recorded(name: str, tmp_path: Path) -> None:
    own = [f"--data.files=['{write(tmp_path / 'a.txt', 'a')}']"] if name == "FileText" else []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextData, "data")
    config = parser.parse_args([f"--data={name}", "--data.seq_len=7", "--data.eval_windows=2", *own])
    data = parser.instantiate(config).data
    assert isinstance(data, getattr(plquant.data, name)) and (data.seq_len, data.eval_windows) == (7, 2)
    assert data.hparams.seq_len == 7 and data.hparams.num_samples == 128


def test_own_and_shared_arguments_are_recorded(ids_file: str) -> None:
    data = TokenIds(ids_file, num_samples=2, batch_size=4)
    assert dict(data.hparams) | {"file": ids_file, "num_samples": 2, "batch_size": 4} == dict(data.hparams)
    assert SelfGenerated(temperature=0.5, seed=9).hparams["temperature"] == 0.5
    assert GivenText("x", seed=9).hparams["seed"] == 9  # also where a subclass does not record itself


@pytest.mark.parametrize("source", [TextData, FileText, HubText, SelfGenerated, TokenIds])
def test_every_argument_is_documented(source: type[TextData]) -> None:
    arguments = set(inspect.signature(source.__init__).parameters) - {"self", "kwargs"}
    assert arguments and all(re.search(rf"^ +{name}: ", source.__doc__ or "", re.M) for name in arguments)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    allowed = {"torch", "lightning", "plquant"}
    standard = sys.stdlib_module_names
    for path in Path(plquant.data.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
                assert {name.split(".")[0] for name in names} <= allowed | standard, f"{path.name} imports {names}"
