"""What is captured replays a model block by block, to the last bit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plquant.blocks.capture import capture_calls, capture_inputs
from plquant.blocks.discovery import find_blocks
from tests.families import FAMILIES, HIDDEN, VOCAB, tiny_model

NUM_TOKENS = 12


def draw_ids(num_samples: int) -> Tensor:
    """[N, T] random tokens, none of them padding."""
    return torch.randint(3, VOCAB, (num_samples, NUM_TOKENS), generator=torch.Generator().manual_seed(num_samples))


def tensors(value: Any) -> list[Tensor]:
    """Every tensor inside nested containers."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in tensors(item)]


def hooks(lm: nn.Module) -> int:
    """How many forward hooks the model has."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.modules())


@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, a) for f in FAMILIES for a in ("eager", "sdpa") if (f, a) != ("gemma2", "sdpa")],  # transformers has no such
)
def test_replaying_the_calls_gives_the_hidden_states_of_the_model(family: str, attention: str) -> None:
    lm = tiny_model(family, attn_implementation=attention)
    _, blocks = find_blocks(lm)
    calls = capture_calls(lm, blocks, draw_ids(1))
    for batch_size in (1, 3):
        ids = draw_ids(batch_size)
        with torch.no_grad():
            hidden = lm(ids, use_cache=False, output_hidden_states=True).hidden_states
            x = capture_inputs(lm, blocks, ids)
            for i, (block, call) in enumerate(zip(blocks, calls, strict=True)):
                assert torch.equal(x, hidden[i])
                x = block(x, **call)
            norm = lm.model.decoder.final_layer_norm if family == "opt" else lm.model.norm
            assert torch.equal(norm(x), hidden[-1])


def test_calls_hold_no_hidden_states_and_no_cache() -> None:
    for family in FAMILIES:
        lm = tiny_model(family)
        for call in capture_calls(lm, find_blocks(lm)[1], draw_ids(1)):
            assert not {"hidden_states", "past_key_values", "past_key_value", "layer_past"} & set(call)
            assert not call.get("use_cache", False)
            assert all(tensor.shape[0] == 1 for tensor in tensors(call))


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_calls_differ_by_kind_and_share_what_is_equal(family: str) -> None:
    lm = tiny_model(family, num_hidden_layers=6, attn_implementation="eager")
    calls = capture_calls(lm, find_blocks(lm)[1], draw_ids(1))
    assert not torch.equal(calls[0]["attention_mask"], calls[1]["attention_mask"])
    local_rope = 2 if family == "gemma3" else 0  # a cosine and a sine of their own
    assert len({id(tensor) for tensor in tensors(calls)}) == 2 + 2 + local_rope + 1  # masks, rope, positions
    for call, next_but_one in pairwise(calls[::2]):
        assert call["attention_mask"] is next_but_one["attention_mask"]


class Stack(nn.Module):
    """A language model of two linears, in which each block gets tensors of its own."""

    def __init__(self, error: Exception | None = None, others: int | None = None, by_name: bool = False) -> None:
        super().__init__()
        self.others, self.by_name = others, by_name
        self.embedding = nn.Embedding(VOCAB, 4)
        self.layers = nn.ModuleList([Layer(others), Layer(others), Layer(others)])
        self.num_run, self.fails_after = 3, 0
        self.error = error

    def forward(self, ids: Tensor, use_cache: bool = True) -> Tensor:
        """[N, T] to [N, T, H]."""
        x = F.dropout(self.embedding(ids), training=self.training)
        if self.error:
            raise self.error
        for i, layer in enumerate(self.layers[: self.num_run]):
            assert layer.kind == "linear"
            rest = (torch.full((1, 3), i // 2),), {"extra": [torch.ones(2), "word"]}
            if self.by_name:
                rest = (), rest[1] | {"states": x, "position": rest[0][0]}
            output = layer(*([] if self.by_name else [x]), *rest[0], **rest[1])
            if self.others == 2:
                x, first, second = output
                assert (first, second) == ("first", "second")
            else:
                x = output if self.others is None else output[0]
            if i + 1 == self.fails_after:
                raise ValueError("midway")
        return x


class Layer(nn.Module):
    """A block with a positional argument besides the hidden states."""

    kind = "linear"  # what a model asks of its blocks

    def __init__(self, others: int | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.others = others
        self.num_calls = 0

    def forward(self, states: Tensor, position: Tensor, extra: Any = None) -> Tensor | tuple[Any, ...]:
        """[N, T, H] to [N, T, H]."""
        self.num_calls += 1
        output = self.linear(states)
        return output if self.others is None else (output, *["first", "second"][: self.others])


def test_positional_arguments_get_their_names_and_equal_tensors_are_one() -> None:
    lm = Stack()
    calls = capture_calls(lm, lm.layers, draw_ids(1))
    assert [set(call) for call in calls] == [{"position", "extra"}] * 3
    assert [call["position"][0, 0].item() for call in calls] == [0, 0, 1]
    assert len({id(tensor) for tensor in tensors(calls)}) == 3
    assert calls[0]["extra"][1] == "word"


@pytest.mark.parametrize("others", [None, 0, 2])
@pytest.mark.parametrize("by_name", [False, True])
def test_calls_run_the_first_block_only(others: int | None, by_name: bool) -> None:
    lm = Stack(others=others, by_name=by_name)
    own = list(lm.layers)
    calls = capture_calls(lm, lm.layers, draw_ids(1))
    assert [layer.num_calls for layer in lm.layers] == [1, 0, 0]
    assert list(lm.layers) == own
    assert [call["position"][0, 0].item() for call in calls] == [0, 0, 1]
    for message, lm.num_run, lm.fails_after in (("ran 2 of the 3", 2, 0), ("midway", 3, 2)):
        with pytest.raises(ValueError, match=message):
            capture_calls(lm, lm.layers, draw_ids(1))
        assert list(lm.layers) == own and hooks(lm) == 0


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_inputs_do_not_depend_on_the_batch_size_and_run_no_block(batch_size: int) -> None:
    lm = Stack()  # in training mode, which must not drop anything
    ids = draw_ids(5)
    inputs = capture_inputs(lm, lm.layers, ids, batch_size)
    assert torch.equal(inputs, lm.embedding(ids)) and not inputs.requires_grad
    assert lm.layers[0].num_calls == 0


def test_inputs_are_in_the_dtype_of_the_model() -> None:
    lm = tiny_model("llama").bfloat16()
    inputs = capture_inputs(lm, find_blocks(lm)[1], draw_ids(3), batch_size=2)
    assert inputs.dtype == torch.bfloat16 and inputs.shape == (3, NUM_TOKENS, HIDDEN)


def test_capture_uses_no_dropout_and_leaves_the_model_as_it_was() -> None:
    lm = tiny_model("opt", dropout=0.5)
    _, blocks = find_blocks(lm)
    expected = capture_inputs(lm, blocks, draw_ids(2))
    capture_calls(lm, blocks, draw_ids(1))
    before = hooks(lm)
    lm.train()
    blocks[1].eval()
    rng = torch.get_rng_state()
    assert torch.equal(capture_inputs(lm, blocks, draw_ids(2)), expected)
    capture_calls(lm, blocks, draw_ids(1))
    assert torch.equal(torch.get_rng_state(), rng)
    assert lm.training and blocks[0].training and not any(m.training for m in blocks[1].modules())
    assert hooks(lm) == before


@pytest.mark.parametrize("capture", [capture_inputs, capture_calls])
def test_errors_of_the_model_pass_through(capture: Any) -> None:
    lm = Stack(ValueError("from the model")).train()
    with pytest.raises(ValueError, match="from the model"):
        capture(lm, lm.layers, draw_ids(1))
    assert lm.training and hooks(lm) == 0


def test_blocks_that_never_run_are_an_error() -> None:
    lm = Stack()
    with pytest.raises(ValueError, match="Stack ran 0 of the 1 blocks"):
        capture_inputs(lm, Stack().layers, draw_ids(1))
    lm.num_run = 2
    with pytest.raises(ValueError, match="Stack ran 2 of the 3 blocks"):
        capture_calls(lm, lm.layers, draw_ids(1))


def test_calls_want_one_sequence_and_inputs_at_least_one() -> None:
    lm = Stack()
    with pytest.raises(ValueError, match=r"one sequence \[1, T\]"):
        capture_calls(lm, lm.layers, draw_ids(2))
    with pytest.raises(ValueError, match="at least one sequence"):
        capture_inputs(lm, lm.layers, draw_ids(1)[:0])
