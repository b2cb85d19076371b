"""Find the decoder blocks of a model, and the places in a block where a transform may be folded.

No table of architectures: a place is proposed by watching where an output arrives, and accepted only if folding random
numbers there leaves the block's output where it was.
"""

# Letters: B batch, T tokens, H hidden size, d channels of a head, P pairs of them.

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from plquant.architectures.moe import alike
from plquant.blocks.proof import Proof
from plquant.blocks.sites import Attention, QuerySite, Site

PROOF_TOKENS = 16  # of a proof's input, as ``find_sites`` wants it
TOLERANCE = 1e-9  # largest relative move of a block's output that counts as none

Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class Places:
    """What there is in a block.

    Attributes:
        sites: Where norms and linears meet linears.
        query_sites: Where queries meet keys.
        attentions: The modules that call transformers' attention interface.
    """

    sites: tuple[Site, ...]
    query_sites: tuple[QuerySite, ...]
    attentions: tuple[Attention, ...]

    def inside(self, parent: str) -> Places:
        """The same with modules named from a module around the block."""
        return Places(
            tuple(site.inside(parent) for site in self.sites),
            tuple(site.inside(parent) for site in self.query_sites),
            tuple(attention.inside(parent) for attention in self.attentions),
        )


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the longest outermost ``ModuleList`` whose members all hold linears.

    Outermost, because a block of 64 experts is longer than the list of 24 blocks around it.

    Raises:
        ValueError: No such list.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_has_linear(block) for block in module)
    }
    outermost = [n for n in lists if not any(n != m and n.startswith(f"{m}." if m else "") for m in lists)]
    if not outermost:
        raise ValueError(
            f"{type(model).__name__} has no torch.nn.ModuleList whose members all hold torch.nn.Linear layers, by "
            "which decoder blocks are found. Rewrite its layers to nn.Linear first (GPT-2 stores them as Conv1D)."
        )
    name = max(outermost, key=lambda name: len(lists[name]))
    return name, lists[name]


def structure(block: nn.Module) -> Hashable:
    """Key that is equal for blocks with the same module names, classes and parameter shapes, hence the same places."""
    return tuple(
        (name, type(module), tuple((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)))
        for name, module in block.named_modules()
    )


def find_in_each(
    blocks: nn.ModuleList | Sequence[nn.Module],
    calls: Sequence[dict[str, Any]],
    find: Callable[[nn.Module, dict[str, Any]], Found],
) -> list[Found]:
    """What ``find`` gives for each block and its call's arguments; blocks of equal ``structure`` share one proof."""
    keys = [structure(block) for block in blocks]
    found: dict[Hashable, Found] = {}
    for key, block, call in zip(keys, blocks, calls, strict=True):
        if key not in found:
            found[key] = find(block, call)
    return [found[key] for key in keys]


def find_places(block: nn.Module, x: Tensor, kwargs: Mapping[str, Any], tolerance: float = TOLERANCE) -> Places:
    """Everything there is in a block, with one proof; arguments as those of ``find_sites``."""
    proof = Proof(block, x, kwargs)
    return Places(tuple(sites_in(proof, tolerance)), tuple(_query_sites(proof, tolerance)), tuple(proof.attentions))


def find_sites(block: nn.Module, x: Tensor, kwargs: Mapping[str, Any], tolerance: float = TOLERANCE) -> list[Site]:
    """Sites of a block in the order their sources run, each with all its consumers and each proven.

    Multiply the output of one norm or linear by a different factor per channel. Linears whose input channels each moved
    by one of these factors, the same for every token, are its consumers, and the factors say which channel went
    where. Folding a random scale there must then leave the block's output alone, which also refuses an output that
    something else reads too. Of a fused linear that fails as a whole some of the output channels are tried: those that
    attention reads as its values, and either half.

    The block is not touched: everything is measured on one float64 copy with random parameters (see ``Proof``). Blocks
    of equal ``structure`` have the same sites, so one of them is enough.

    Args:
        block: Decoder block, any dtype and device.
        x: [B, T, H] hidden states; only their shape and device are used. A few dozen tokens are enough.
        kwargs: The other arguments of a call with such an ``x``, without a KV cache.
        tolerance: Largest relative move of the output that counts as none.

    Raises:
        ValueError: ``x`` has fewer than two tokens, or a linear of the block never ran.
    """
    return sites_in(Proof(block, x, kwargs), tolerance)


def find_query_sites(
    block: nn.Module, x: Tensor, kwargs: Mapping[str, Any], tolerance: float = TOLERANCE
) -> list[QuerySite]:
    """Query sites of a block in the order they run, each proven; arguments as those of ``find_sites``.

    The channels of a head that reach attention unmixed are free. The others are paired as RoPE is written in practice:
    the first half with the second, or neighbours; the proof says which.
    """
    return _query_sites(Proof(block, x, kwargs), tolerance)


def sites_in(proof: Proof, tolerance: float = TOLERANCE) -> list[Site]:
    """``find_sites`` with a proof that is at hand."""
    sites: list[Site] = []
    for sources in alike(proof.block, proof.sources):
        for rows in _rows_tried(proof, sources[0]):
            taken = {name for site in sites for name in site.consumers}
            # a ReLU passes positive scales, so gate and up both reach down; one input, one transform
            proposed = [site for site in _propose(proof, sources, rows) if not taken & set(site.consumers)]
            error = proof.error(*proposed) if proposed else float("nan")
            if error < tolerance:  # a NaN is no proof
                sites += _accept(proof, proposed, error, tolerance)
                break
    return sorted(sites, key=lambda site: proof.sources.index(site.source))


def _rows_tried(proof: Proof, source: str) -> Iterator[slice]:
    """Sets of output channels of which a site may be made."""
    yield slice(None)
    if not proof.is_norm(source):
        for operands in proof.operands.values():
            name, rows = operands.get("value", ("", slice(None)))
            if name == source and rows != slice(None):
                yield rows
        half, odd = divmod(proof.num_channels(source), 2)
        if not odd:
            yield from (slice(0, half), slice(half, 2 * half))


def _propose(proof: Proof, sources: Sequence[str], rows: slice) -> list[Site]:
    """What would be the site of each source, if it is one."""
    proposed = []
    offset = proof.gain_offset(sources[0])
    found = [] if offset is None else proof.readers(sources, rows)
    for source, (readers, channel) in zip(sources, found, strict=False):
        consumers = tuple(name for name in readers if name not in proof.kept)
        if channel is not None and consumers and offset is not None:
            kept = tuple(name for name in readers if name in proof.kept)
            kind: Literal["norm", "linear"] = "norm" if proof.is_norm(source) else "linear"
            nan = float("nan")
            proposed.append(Site(source, consumers, channel.cpu(), kind, False, nan, offset, rows, kept=kept))
    return proposed


def _accept(proof: Proof, proposed: Sequence[Site], error: float, tolerance: float) -> list[Site]:
    """The sites with all that they admit."""
    names = [name for site in proposed for name in (site.source, *site.readers)]
    shift = proof.has_biases(*names) and proof.error(*proposed, with_shift=True) < tolerance
    head_dim = _head_dim(proof, proposed, tolerance) if proposed[0].kind == "linear" else None
    return [
        replace(
            site,
            admits_shift=shift,
            error=error,
            head_dim=head_dim,
            direct=proof.hands_on(site.source, site.consumers),
        )
        for site in proposed
    ]


def _head_dim(proof: Proof, sites: Sequence[Site], tolerance: float) -> int | None:
    """The widest heads, each of which may be multiplied by a matrix; ``None`` if only scales may.

    A matrix on each head of 2 channels is one on each head of 4, so the width is found prime by prime.
    """
    count = proof.num_channels(sites[0].source, sites[0].rows)
    width = 1
    for prime in (p for p in range(2, count + 1) if count % p == 0 and all(p % q for q in range(2, p))):
        while count % (width * prime) == 0 and proof.matrix_error(width * prime, *sites) < tolerance:
            width *= prime
    return width if width > 1 else None


def _query_sites(proof: Proof, tolerance: float) -> list[QuerySite]:
    sites = []
    for attention in proof.attentions:
        operands = proof.operands[attention.name]
        if "query" not in operands or "key" not in operands or attention.heads % attention.kv_heads:
            continue
        (query, query_rows), (key, key_rows) = operands["query"], operands["key"]
        offset = proof.gain_offset(query)
        if proof.is_norm(query) != proof.is_norm(key) or offset is None or offset != proof.gain_offset(key):
            continue
        if query == key and proof.is_norm(query):
            continue  # one gain cannot be multiplied and divided
        free = proof.free_channels(attention, query, query_rows)
        for pairs in _pairs_tried(free, attention.head_dim):
            site = QuerySite(
                query,
                key,
                query_rows,
                key_rows,
                attention.heads,
                attention.kv_heads,
                attention.head_dim,
                pairs.cpu(),
                free.cpu(),
                "norm" if proof.is_norm(query) else "linear",
                float("nan"),
                offset,
            )
            error = proof.query_error(site)
            if error < tolerance:
                sites.append(replace(site, error=error))
                break
    return sites


def _pairs_tried(free: Tensor, head_dim: int) -> Iterator[Tensor]:
    """Ways to pair the channels of a head that are not free, each int64 [P, 2]."""
    is_free = torch.zeros(head_dim, dtype=torch.bool, device=free.device).index_fill(0, free, True)
    rotary = (~is_free).nonzero().flatten()
    if len(rotary) % 2:
        return
    yield rotary.unflatten(0, (2, -1)).T  # Llama: one half with the other
    if len(rotary):
        yield rotary.unflatten(0, (-1, 2))  # GLM, Cohere: neighbours


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear) for m in module.modules())
