"""Rotating the residual stream of a whole model, which costs nothing at run time (R1 of SpinQuant and QuaRot).

RMSNorm(x Q) = RMSNorm(x) Q once its gain has moved into the linears behind it, so that every block can work on x Q:
what reads the stream takes Q^T up, what writes to it takes Q. LayerNorm too, if Q leaves the mean over channels where
it is.
"""

# Letters: N sequences of T tokens, H hidden size.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from plquant.blocks.capture import capture_calls, capture_inputs
from plquant.blocks.discovery import PROOF_TOKENS, TOLERANCE, find_blocks, find_in_each, sites_in
from plquant.blocks.fold import Fold
from plquant.blocks.proof import Proof, is_norm
from plquant.blocks.sites import Site, Stream
from plquant.evaluating import evaluating
from plquant.nn.online import attach_online_
from plquant.transforms.hadamard import keeping_mean, orthogonal, split_width
from plquant.transforms.online import KroneckerOp, MatrixOp, OnlineOp

INSTEAD = "Rotate behind the norms instead: norms, not residual, among the places of Rotation."
CLOSE = 0.1  # of the logits' norm: what rounding to the model's dtype may move; a mistake moves all of it


def find_stream(proof: Proof, tolerance: float = TOLERANCE) -> Stream | None:
    """What touches the residual stream of a block; ``None`` if a rotation of it does not fold there.

    It does not where a norm with a gain lies between a linear and the stream (Gemma's after attention and MLP), nor
    where a norm has a bias that the linears behind it have none to add to (StableLM).
    """
    norms = tuple(site for site in sites_in(proof, tolerance) if site.kind == "norm")
    reading = {name for site in norms for name in site.readers}
    linears = [name for name in proof.sources if not proof.is_norm(name) and name not in reading]
    writers = tuple(name for name in linears if proof.num_channels(name) == proof.hidden_size)
    for keeps_mean in (False, True):
        rotation = _dense(_Rotation.random(proof.hidden_size, keeps_mean, seed=0))
        error = proof.stream_error(Stream(norms, writers, keeps_mean, 0.0), rotation)
        if error < tolerance:
            return Stream(norms, writers, keeps_mean, error)
    return None


@torch.no_grad()
def rotate_stream_(lm: nn.Module, ids: Tensor, seed: int = 0) -> None:
    """Rotate the residual stream of a model, in place.

    Where the token embedding is the head too, both keep their weight: the stream is rotated behind the one and back
    before the last norm, at run time. Back it goes too where the last norm has a bias and the head none.

    Args:
        lm: The language model, its experts unfused.
        ids: int64 [N, T], any text.
        seed: Chooses the rotation, of Hadamard matrices where such are known for the width.

    Raises:
        ValueError: It does not fold into this model.
    """
    few = ids[:1, :PROOF_TOKENS]
    _, layers = find_blocks(lm)
    hidden, calls = capture_inputs(lm, layers, few), capture_calls(lm, layers, few)
    found = find_in_each(layers, calls, lambda layer, call: find_stream(Proof(layer, hidden, call)))
    streams = [stream for stream in found if stream is not None]
    if len(streams) < len(found):
        raise ValueError(
            f"a rotation of the residual stream does not fold into the blocks of {type(lm).__name__}: what is added to "
            f"it goes through a norm first, or is not known. {INSTEAD}"
        )
    before = _logits(lm, few)
    rotation = _Rotation.random(hidden.shape[-1], any(stream.keeps_mean for stream in streams), seed)
    dense = _dense(rotation)
    for layer, stream in zip(layers, streams, strict=True):
        fold = Fold(dict(layer.named_modules()))
        fold.rotate(stream, dense)
        _store_(layer, fold)
    _rotate_ends_(lm, layers, streams[0].norms[0], rotation)
    moved = float((_logits(lm, few) - before).norm() / before.norm())
    if not moved < CLOSE:
        raise ValueError(
            f"rotating the residual stream of {type(lm).__name__} moved its logits by {moved:.0%}: something outside "
            f"of its blocks reads or writes the stream that is not known. {INSTEAD}"
        )


class _Rotation(NamedTuple):
    """x -> x Q and back, as run-time operations."""

    width: int
    there: OnlineOp
    back: OnlineOp

    @classmethod
    def random(cls, width: int, keeps_mean: bool, seed: int) -> _Rotation:
        """One of this width, in fp64."""
        generator = torch.Generator().manual_seed(seed)
        if keeps_mean:
            matrix = keeping_mean(width, generator)
            return cls(width, MatrixOp(matrix[None]), MatrixOp(matrix.T[None]))
        left, right = (orthogonal(n, generator) for n in split_width(width))
        return cls(width, KroneckerOp.rotation(left, right), KroneckerOp.rotation(left.T, right.T))


def _dense(rotation: _Rotation) -> Tensor:
    """Q, fp64 [H, H]."""
    return rotation.there(torch.eye(rotation.width, dtype=torch.float64))


def _rotate_ends_(lm: nn.Module, layers: nn.ModuleList, norm: Site, rotation: _Rotation) -> None:
    """Embeddings, the last norm and the head."""
    inside = {id(module) for module in layers.modules()}
    outside = {name: module for name, module in lm.named_modules() if id(module) not in inside}
    width, dense = rotation.width, _dense(rotation)
    last = {n: m for n, m in outside.items() if is_norm(m) and m.get_parameter("weight").numel() == width}
    tokens, head = lm.get_input_embeddings(), lm.get_output_embeddings()  # type: ignore[operator]
    if len(last) != 1 or type(next(iter(last.values()))) is not type(layers[0].get_submodule(norm.source)):
        raise ValueError(
            f"{type(lm).__name__} has {len(last)} norms behind its blocks ({', '.join(last)}), where one of the kind "
            f"in the blocks is expected. {INSTEAD}"
        )
    (name, module), *_ = last.items()
    is_tied = head.weight is tokens.weight
    for embedding in outside.values():
        if isinstance(embedding, nn.Embedding) and embedding.embedding_dim == width:
            if is_tied and embedding is tokens:
                attach_online_(embedding, [rotation.there.to(embedding.weight.dtype)])
            else:
                embedding.weight.copy_(embedding.weight.double() @ dense)
    if is_tied or (getattr(module, "bias", None) is not None and head.bias is None):
        attach_online_(module, [rotation.back.to(tokens.weight.dtype)], at="input")
        return
    fold = Fold(outside)
    readers = tuple(path for path, found in outside.items() if found is head)
    site = Site(name, readers, torch.arange(width), "norm", False, 0.0, norm.gain_offset)
    fold.rotate(Stream((site,), (), False, 0.0), dense)
    _store_(lm, fold)


def _store_(module: nn.Module, fold: Fold) -> None:
    for path, value in fold.parameters.items():
        module.get_parameter(path).copy_(value)


def _logits(lm: nn.Module, ids: Tensor) -> Tensor:
    with evaluating(lm):
        return lm(ids.to(next(lm.parameters()).device), use_cache=False).logits.float()
