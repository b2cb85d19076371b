"""The places in a block where transforms fold, and the attention between them: plain records."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

# Letters: C channels of a source, I input channels of a consumer, d channels of a head.


@dataclass(frozen=True, eq=False)
class Site:
    """A place where a per-channel transform folds: the block computes the same function after it.

    Attributes:
        source: Name of the norm or linear in the block.
        consumers: Names of the linears whose input channels are the source's output channels, in the order they run.
        channel: int64 [I]; input channel j of every consumer reads channel ``channel[j]`` of the source, counted within
            ``rows``. The identity, or repeated heads under grouped-query attention.
        kind: What the source is.
        admits_shift: Proven for a shift too; otherwise for a positive scale only.
        error: Measured in the proof: move of the block's output over the norm of what the block adds to its input.
        gain_offset: 1.0 for a norm that multiplies by ``1 + weight``, else 0.0.
        rows: Output channels of a fused linear that are the C channels of this site: v in qkv, up in gate_up.
        head_dim: The channels are heads of this width, and a matrix for each head of the source was proven; ``None``
            where only scales were.
        direct: Proven that the consumers are called with the very tensor that the source gives, and that nobody else
            looks at it: it may be anything that they understand.
        kept: Names of other modules with a weight [E, C] that read the channels but are not quantized, as the router of
            a mixture of experts: they take what consumers take, in full precision.
    """

    source: str
    consumers: tuple[str, ...]
    channel: Tensor
    kind: Literal["norm", "linear"]
    admits_shift: bool
    error: float
    gain_offset: float = 0.0
    rows: slice = field(default_factory=lambda: slice(None))
    head_dim: int | None = None
    direct: bool = False
    kept: tuple[str, ...] = ()

    @property
    def readers(self) -> tuple[str, ...]:
        """All that read the channels."""
        return self.consumers + self.kept

    def inside(self, parent: str) -> Site:
        """The same site with its modules named from a module around the block."""
        consumers, kept = (tuple(f"{parent}.{name}" for name in names) for names in (self.consumers, self.kept))
        return replace(self, source=f"{parent}.{self.source}", consumers=consumers, kept=kept)


@dataclass(frozen=True, eq=False)
class QuerySite:
    """A place between queries and keys: for every key head, a matrix folds there that commutes with what RoPE does.

    On the channels of ``pairs`` that is one complex number per pair, on those of ``free`` any matrix: q -> M q and
    k -> M^-T k, where all query heads that read a key head share its M. Each of ``query`` and ``key`` is a linear, or
    the norm behind it.

    Attributes:
        query: Name of the module that writes the queries.
        key: Name of the module that writes the keys.
        query_rows: Its output channels that are the query heads, in order; all of them if it is a norm.
        key_rows: The same for the keys.
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Channels of a head, d.
        pairs: int64 [P, 2], channels of a head that RoPE turns together.
        free: int64 [F], channels of a head that it leaves alone; all of them without RoPE.
        kind: What writes them. A norm's gain [d] is shared by all heads, and takes one positive scale per pair and per
            free channel only.
        error: As that of a ``Site``.
        gain_offset: 1.0 for norms that multiply by ``1 + weight``, else 0.0.
    """

    query: str
    key: str
    query_rows: slice
    key_rows: slice
    heads: int
    kv_heads: int
    head_dim: int
    pairs: Tensor
    free: Tensor
    kind: Literal["linear", "norm"]
    error: float
    gain_offset: float = 0.0

    def inside(self, parent: str) -> QuerySite:
        """The same site with its modules named from a module around the block."""
        return replace(self, query=f"{parent}.{self.query}", key=f"{parent}.{self.key}")


@dataclass(frozen=True, eq=False)
class Stream:
    """All of a block that touches the residual stream, where a rotation of the stream is proven to fold.

    Attributes:
        norms: Sites of the norms that read it, and of what reads these.
        writers: Names of the linears whose output is added to it.
        keeps_mean: Proven only for rotations that leave the mean over channels, which LayerNorm subtracts, where it is.
        error: As that of a ``Site``.
    """

    norms: tuple[Site, ...]
    writers: tuple[str, ...]
    keeps_mean: bool
    error: float


@dataclass(frozen=True)
class Attention:
    """A module that calls transformers' attention interface.

    Attributes:
        name: Its name in the block.
        heads: Heads of the queries.
        kv_heads: Heads of the keys and values.
        head_dim: Channels of a query's and a key's head.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int

    def inside(self, parent: str) -> Attention:
        """The same with its name from a module around the block."""
        return replace(self, name=f"{parent}.{self.name}")
