"""Files from elsewhere that are damaged or mean harm: one clear error, and nothing of them is run or left behind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import plquant as pq
from plquant.cli import main
from plquant.data.files import jsonl_rows, parquet_rows
from plquant.sources import Source

FEW = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "25")))  # make test-slow has more


class Ran:
    """A pickle that notes in a folder that it was read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return exec, (leaves_a_note(self.folder),)


def leaves_a_note(folder: Path) -> str:
    """Python code that does."""
    return f"import pathlib; pathlib.Path({str(folder / 'ran')!r}).touch()"


def calibrate(folder: Path, out: Path) -> None:
    main(
        f"calibrate --model.checkpoint {folder} --output_dir {out} --model.method RTN --data.num_samples 1 "
        "--data.seq_len 16 --model.weights.group_size 16 --evaluate false --trainer.accelerator cpu".split()
    )


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "model")


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Ran(folder)}, folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def one_tensor_short(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def escaping(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_such_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(leaves_a_note(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (only_pickles, "only pytorch_model.bin, which can run code when read and are not"),
        (truncated, "model.safetensors is damaged or no safetensors file"),
        (one_tensor_short, "has no model.layers.1.mlp.up_proj.weight; give a complete checkpoint"),
        (wrong_shape, "can't be loaded"),
        (escaping, "names '../outside.safetensors'; the shards must lie in the folder itself"),
        (no_such_shard, "names model-00001.safetensors, not found in the folder"),
        (own_code, "trust_remote_code"),
    ],
)
def test_a_folder_that_is_not_sound_is_refused(
    change: Callable[[Path], None], message: str, folder: Path, tmp_path: Path
) -> None:
    change(folder)
    with pytest.raises(SystemExit) as stop:
        calibrate(folder, tmp_path / "out")
    assert message in str(stop.value.code) and not (folder / "ran").exists() and not (tmp_path / "out").exists()


def refuses_or_works(job: Callable[[], Any]) -> None:
    try:
        job()
    except (ValueError, OSError) as error:
        assert str(error)


Damage = Callable[[bytes], bytes]


def overwritten(content: bytes, start: int, other: bytes) -> bytes:
    return content[:start] + other + content[start + len(other) :]


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """Cut off, or some bytes at some place written over; more often near the start, where headers are."""
    share = draw(st.floats(0, 1)) ** 3
    other = draw(st.binary(min_size=1, max_size=12))
    if draw(st.booleans()):
        return lambda content: content[: int(share * len(content))]
    return lambda content: (
        content[: int(share * len(content))] + other + content[int(share * len(content)) + len(other) :]
    )


@FEW
@given(damage=damages())
def test_any_safetensors_file(damage: Damage, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("st") / "model")
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refuses_or_works(lambda: pq.QuantizedLM(str(folder), pq.methods.RTN).lm)


CONFIG_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 64),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(0, 3), max_size=2),
)


@FEW
@given(data=st.data())
def test_any_config(data: st.DataObject, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("config") / "model")
    config = json.loads((folder / "config.json").read_text())
    config[data.draw(st.sampled_from(sorted(config)))] = data.draw(CONFIG_VALUES)
    (folder / "config.json").write_text(json.dumps(config))

    def shapes_and_weights() -> None:
        model = pq.QuantizedLM(str(folder), pq.methods.RTN)
        model.linear_shapes()
        assert model.lm is not None

    refuses_or_works(shapes_and_weights)


JSON_VALUES = st.recursive(CONFIG_VALUES, lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=2))


@FEW
@given(data=st.data())
def test_any_index(data: st.DataObject, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("index") / "model")
    names = st.sampled_from(["model.safetensors", "../model.safetensors", "/etc/passwd", "a/b", "", ".", "x\0"])
    names_map = st.dictionaries(st.sampled_from(["model.norm.weight", "x"]), names | CONFIG_VALUES, max_size=2)
    index = data.draw(st.one_of(JSON_VALUES, st.fixed_dictionaries({"weight_map": names_map | JSON_VALUES})))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses_or_works(lambda: pq.QuantizedLM(str(folder), pq.methods.RTN).lm)


@pytest.fixture(scope="module")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a gather and quantized activations, which plquant's own part of the config describes."""
    out = tmp_path_factory.mktemp("packed") / "out"
    model = pq.QuantizedLM(str(checkpoint), pq.methods.QLLM, pq.IntGrid(3, 16), pq.ActivationGrid(4))
    trainer = pq.BlockwiseTrainer(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    trainer.calibrate(model, pq.data.BuiltinText(num_samples=1, seq_len=32), output_dir=str(out), evaluate=False)
    return out


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to every value of nested dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in [(*path, key), *places(value, (*path, key))]]


@FEW
@given(data=st.data())
def test_any_config_of_a_quantized_model(
    data: st.DataObject, packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = shutil.copytree(packed, tmp_path_factory.mktemp("packed") / "out")
    config = json.loads((folder / "config.json").read_text())
    *path, last = data.draw(st.sampled_from(places(config["quantization_config"])))
    there: Any = config["quantization_config"]
    for key in path:
        there = there[key]
    there[last] = data.draw(JSON_VALUES)
    (folder / "config.json").write_text(json.dumps(config))
    refuses_or_works(lambda: pq.load(folder))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gguf import GGUFWriter

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    for name, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 8,
        "feed_forward_length": 16,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_tensor("token_embd.weight", torch.randn(16, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@FEW
@given(damage=damages())
def test_any_gguf_file(damage: Damage, gguf_file: Path) -> None:
    damaged = gguf_file.with_name("damaged.gguf")
    damaged.write_bytes(damage(gguf_file.read_bytes()))
    refuses_or_works(lambda: Source.find(str(damaged)).config())


@FEW
@given(
    content=st.one_of(st.binary(max_size=60), st.sampled_from([b"[" * 100_000, b'{"text": 1}', b'{"text": "\\ud800"}']))
)
def test_any_jsonl_file(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    path.write_bytes(content)
    refuses_or_works(lambda: jsonl_rows(str(path), "text"))


@FEW
@given(damage=damages())
def test_any_parquet_file(damage: Damage, tmp_path_factory: pytest.TempPathFactory) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path_factory.mktemp("parquet") / "x.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["to be", "or not"]}), path)
    path.write_bytes(damage(path.read_bytes()))
    refuses_or_works(lambda: parquet_rows(str(path), "text"))
