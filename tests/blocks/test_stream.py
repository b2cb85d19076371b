"""Rotating the residual stream."""

import pytest
import torch
from torch import nn

import plquant.blocks.stream as stream_module
from plquant.blocks.proof import Proof, _AllDouble
from plquant.blocks.stream import find_stream, rotate_stream_
from plquant.nn.online import Online
from tests.blocks.prepared import prepared, proof_of
from tests.families import FAMILIES, VOCAB, tiny_model

# A norm with a gain lies between their linears and the stream; norms with a bias, linears behind them without one.
REFUSED = {"gemma2", "gemma3", "stablelm"}
LAYER_NORM = {"opt", "starcoder2"}
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(lm: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return lm(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_proves_it_or_refuses(family: str) -> None:
    blocks, x, calls = prepared(family)
    for block, call in zip(blocks, calls, strict=True):
        found = find_stream(Proof(block, x, call))
        assert (found is None) == (family in REFUSED)
        if found is not None:
            assert found.error < 1e-12 and found.keeps_mean == (family in LAYER_NORM)
            assert len(found.norms) in (1, 2) and found.writers


def test_what_is_no_rotation_fails_the_proof() -> None:
    proof = proof_of("llama")
    found = find_stream(proof)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(proof.hidden_size, proof.hidden_size, generator=generator, dtype=torch.float64)
    assert proof.stream_error(found, torch.linalg.qr(random).Q) < 1e-12
    assert proof.stream_error(found, random / proof.hidden_size**0.5) > 1e-2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in REFUSED])
def test_the_model_computes_the_same(family: str, tied: bool) -> None:
    """In float64, what a model casts to fp32 itself too; embeddings and head included."""
    lm = tiny_model(family, tie_word_embeddings=tied).double()
    with _AllDouble():
        before = logits(lm)
    weights = {name: p.clone() for name, p in lm.named_parameters()}
    rotate_stream_(lm, IDS)
    with _AllDouble():
        assert (logits(lm) - before).norm() / before.norm() < 1e-9
    moved = {name for name, p in lm.named_parameters() if not torch.equal(p, weights[name])}
    assert any("embed_tokens" in name for name in moved) != tied
    online = [name for name, m in lm.named_modules() if isinstance(m, Online)]
    assert len(online) == (2 if tied else 1 if family in LAYER_NORM else 0)
    assert ("lm_head.weight" in moved) == (not online)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_the_others_are_refused_and_left_alone(family: str) -> None:
    lm = tiny_model(family)
    before = logits(lm)
    with pytest.raises(ValueError, match="norms, not residual"):
        rotate_stream_(lm, IDS)
    assert torch.equal(logits(lm), before)


def test_a_reader_outside_of_the_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the last norm were forgotten."""
    lm = tiny_model("llama", tie_word_embeddings=False)
    monkeypatch.setattr(stream_module, "_rotate_ends_", lambda *_: None)
    with pytest.raises(ValueError, match="moved its logits by"):
        rotate_stream_(lm, IDS)
