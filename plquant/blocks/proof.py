"""The float64 copy of a block on which places for transforms are proposed and proven.

Proposed by multiplying what a module writes by a factor of its own for each channel, and looking where the factors
arrive; proven by folding random transforms there and finding the block's output where it was.
"""

# Letters: B batch, T tokens, C channels of a source, I input channels of a consumer, N = B T, h heads of d channels.

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from plquant.architectures.moe import routers
from plquant.blocks.attentions import watching_attention
from plquant.blocks.fold import Fold
from plquant.blocks.nested import map_tensors
from plquant.blocks.replay import Instead, Knows, Replay
from plquant.blocks.sites import Attention, QuerySite, Site, Stream
from plquant.nn.token_norm import tokens_like

# Random inputs drawn, at most, until every linear has run and every channel has been seen non-zero (ReLU, experts).
MAX_DRAWS = 64
# Two float64 factors closer than this (relative) are the same one. The factors used lie at least 1 / C apart.
SAME = 1e-9

Operand: TypeAlias = Literal["query", "key", "value"]
_OPERANDS: tuple[Operand, ...] = ("query", "key", "value")


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    came: Any = None  # the first argument itself, of which ``args`` has a copy
    gave: Any = None  # the output itself


class Proof:
    """A float64 copy of a block with random parameters, on which equivalences are measured.

    Random, because gains of one and biases of zero hide mistakes, and of a size at which softmax and activation
    functions are far from linear. Casts to lower precision inside the block (norms and softmax in fp32) become casts
    to float64, so that an equivalence holds to about 1e-15 and nothing else does.

    Args:
        block: Decoder block; not touched.
        x: [B, T, H] hidden states; only their shape and device are used.
        kwargs: The other arguments of a call.
        seed: Of the parameters, inputs and transforms drawn.

    Attributes:
        block: The copy.
        modules: The modules of the copy by name.
        kept: Names of those that read channels like linears, but are not to be quantized.
        sources: Names of its norms and linears, in the order they run.
        attentions: Its calls of transformers' attention interface, in the order they run.
    """

    @torch.no_grad()
    def __init__(self, block: nn.Module, x: Tensor, kwargs: Mapping[str, Any], seed: int = 0) -> None:
        if x.ndim != 3 or x.shape[1] < 2:
            raise ValueError(
                f"x has shape {list(x.shape)}; a proof needs hidden states [batch, tokens, hidden] of two tokens or "
                "more, or attention has nothing to mix. Pass a longer sequence and the arguments that go with it."
            )
        self._generator = torch.Generator(x.device).manual_seed(seed)
        self.block = copy.deepcopy(block).double().eval()
        self._kwargs = map_tensors(lambda t: t.double() if t.is_floating_point() else t, dict(kwargs))
        self.modules = dict(self.block.named_modules())
        self._names = {module: name for name, module in self.modules.items()}
        for module in self.modules.values():
            module._forward_pre_hooks.clear()  # they belong to whoever watches the original
            module._forward_hooks.clear()
            self._randomize_(module)
        self._draw_inputs(x)
        self._outputs = [self._run(x) for x in self._inputs]
        self._readers = [name for name in self._calls if _is_reader(self.modules[name])]
        linears = {name for name in self._readers if isinstance(self.modules[name], nn.Linear)}
        linears -= {*routers(self.block)}
        self.kept = {*self._readers} - linears
        self.sources = [name for name in self._calls if name in linears or self.is_norm(name)]
        self.attentions = [_attention(name, calls[0]) for name, calls in self._calls.items() if name in self._attending]

    @torch.no_grad()
    def move(self, parameters: Mapping[str, Tensor]) -> float:
        """Relative move of the output when ``parameters``, by name, replace the copy's: ||f' - f|| / ||f - x||.

        Relative to what the block adds to the residual stream, since a large x would hide an error.
        """
        moved = added = 0.0
        for x, output in zip(self._inputs, self._outputs, strict=True):
            moved += float((self._run(x, parameters) - output).square().sum())
            added += float((output - x).square().sum())
        return (moved / added) ** 0.5

    @torch.no_grad()
    def error(self, *sites: Site, with_shift: bool = False) -> float:
        """Relative move of the output by folding a random scale in (1/e, e), and shift if asked, at all these sites."""
        fold = Fold(self.modules)
        for site in sites:
            scale = self._uniform(self.num_channels(site.source, site.rows), -1, 1).exp()
            shift = self._uniform(len(scale), -1, 1) if with_shift else None
            channel = site.channel.to(scale.device)
            fold.write(site.source, 1 / scale[:, None, None], shift, site.rows, site.gain_offset)
            for name in site.readers:
                fold.read(name, scale[channel, None, None], None if shift is None else shift[channel])
        return self.move(fold.parameters)

    @torch.no_grad()
    def matrix_error(self, head_dim: int, *sites: Site) -> float:
        """The same by folding a random matrix for each head of a site's source; infinite if heads are not read whole.

        Args:
            head_dim: Channels of a head, a divisor of the source's.
            sites: Whose sources are linears.
        """
        fold = Fold(self.modules)
        for site in sites:
            if len(site.channel) % head_dim:
                return float("inf")
            heads = site.channel.to(self._device).unflatten(0, (-1, head_dim))
            if not torch.equal(heads, heads[:, :1] // head_dim * head_dim + self._count(head_dim)):
                return float("inf")
            matrix = self._matrices(self.num_channels(site.source, site.rows) // head_dim, head_dim)
            fold.write(site.source, matrix, rows=site.rows)
            for name in site.readers:
                fold.read(name, matrix.inverse()[heads[:, 0] // head_dim])
        return self.move(fold.parameters)

    @torch.no_grad()
    def query_error(self, site: QuerySite) -> float:
        """The same by folding for each key head a random complex number per pair, and a matrix on its free channels.

        If norms are to take it up, a scale per pair and free channel.
        """
        fold = Fold(self.modules)
        if site.kind == "norm":
            scale = self._uniform(site.head_dim, -1, 1).exp()
            scale[site.pairs[:, 1]] = scale[site.pairs[:, 0]]
            fold.write(site.query, scale[:, None, None], gain_offset=site.gain_offset)
            fold.write(site.key, 1 / scale[:, None, None], gain_offset=site.gain_offset)
            return self.move(fold.parameters)
        modulus = self._uniform(site.kv_heads * site.head_dim, -1, 1).exp().unflatten(0, (-1, site.head_dim))
        angle = self._uniform(site.kv_heads * len(site.pairs), -torch.pi, torch.pi).unflatten(0, (site.kv_heads, -1))
        real, imaginary = site.pairs.to(self._device).T
        matrix = modulus.diag_embed()
        matrix[:, real, real] = matrix[:, imaginary, imaginary] = modulus[:, real] * angle.cos()
        matrix[:, imaginary, real] = modulus[:, real] * angle.sin()
        matrix[:, real, imaginary] = -modulus[:, real] * angle.sin()
        free = site.free.to(self._device)
        matrix[:, free[:, None], free] = self._matrices(site.kv_heads, len(free))
        shared = matrix.repeat_interleave(site.heads // site.kv_heads, 0)
        fold.write(site.query, shared, rows=site.query_rows)
        fold.write(site.key, matrix.inverse().mT, rows=site.key_rows)
        return self.move(fold.parameters)

    @torch.no_grad()
    def stream_error(self, stream: Stream, rotation: Tensor) -> float:
        """The same by rotating the residual stream: f'(x Q) should be f(x) Q. ``rotation`` is Q, [H, H]."""
        fold = Fold(self.modules)
        fold.rotate(stream, rotation)
        moved = added = 0.0
        for x, output in zip(self._inputs, self._outputs, strict=True):
            moved += float((self._run(x @ rotation, fold.parameters) - output @ rotation).square().sum())
            added += float((output - x).square().sum())
        return (moved / added) ** 0.5

    @torch.no_grad()
    def readers(self, sources: Sequence[str], rows: slice = slice(None)) -> list[tuple[tuple[str, ...], Tensor | None]]:
        """Who reads the channels of each source, each scaled by nothing but itself, and their channel map [I].

        No map if nobody does, or if they read the channels in different orders, which one site cannot say.

        Args:
            sources: Alike in shape, and none able to reach what another reaches.
            rows: The output channels of each that are asked for.
        """
        count = self.num_channels(sources[0], rows)
        factors = self._factors(len(sources) * count).unflatten(0, (-1, count))
        calls = self._probe({source: (factor, rows) for source, factor in zip(sources, factors, strict=True)})
        maps: list[dict[str, Tensor]] = [{} for _ in sources]
        for name in self._readers:
            channel = match_channels(_tokens(self._calls[name]), _tokens(calls[name]), factors.flatten())
            number = int(channel[0]) // count
            if bool((channel >= 0).all()) and bool((channel // count == number).all()):
                maps[number][name] = channel % count
        found: list[tuple[tuple[str, ...], Tensor | None]] = []
        for named in maps:
            channels = list(named.values())
            alike = bool(channels) and all(torch.equal(channel, channels[0]) for channel in channels)
            found.append((tuple(named), channels[0]) if alike else ((), None))
        return found

    @torch.no_grad()
    def hands_on(self, source: str, readers: Sequence[str]) -> bool:
        """Whether what the source gives is for these alone, who are called with the very tensor.

        Then it may be anything that they understand: in its place the block passes on random bytes of another width,
        these give what they gave before, and nobody notices, not by its dtype or shape either.
        """
        made = self._calls[source]
        if any(len(made) != len(self._calls[reader]) for reader in readers):
            return False
        pairs = [pair for reader in readers for pair in zip(made, self._calls[reader], strict=True)]
        if any(len(one.args) != 1 or one.kwargs or one.gave is not other.came for one, other in pairs):
            return False
        given = [tokens_like(call.output) for call in made]
        with contextlib.ExitStack() as stack:
            stack.callback(self.modules[source].register_forward_hook(Instead(given)).remove)
            for reader in readers:
                self.modules[reader].forward = Knows(given, [call.output for call in self._calls[reader]])
                stack.callback(self.modules[reader].__dict__.pop, "forward")
            try:
                return all(torch.equal(self._run(x), y) for x, y in zip(self._inputs, self._outputs, strict=True))
            except Exception:  # whatever other code makes of it
                return False

    @cached_property
    def operands(self) -> dict[str, dict[Operand, tuple[str, slice]]]:
        """For each attention by name: which module writes its queries, keys and values, and with which output channels.

        Only those that hold the heads in order, one after the other, or, in a norm, one head for all. Of several (a
        norm may have a projection before it) the last.
        """
        return {attention.name: self._operands(attention) for attention in self.attentions}

    @torch.no_grad()
    def free_channels(self, attention: Attention, source: str, rows: slice) -> Tensor:
        """Channels of a head of the queries that arrive as their source writes them, int64 [F]: no RoPE there."""
        count = self.num_channels(source, rows)
        factor = self._factors(count)
        calls = self._probe({source: (factor, rows)})[attention.name]
        arrived = match_channels(_heads(self._calls[attention.name], 0), _heads(calls, 0), factor)
        per_head = (-1, attention.head_dim)
        is_own = arrived.unflatten(0, per_head) == self._count(count).unflatten(0, per_head)
        return is_own.all(0).nonzero().flatten()

    @torch.no_grad()
    def gain_offset(self, source: str) -> float | None:
        """``a`` of a norm that multiplies by ``weight + a``, found by asking it at weight 0 and 1; None for any other.

        0.0 for a linear.
        """
        if not self.is_norm(source):
            return 0.0
        args, kwargs, *_ = self._calls[source][0]
        weight, bias = self._parameters(source)
        no_bias = {} if bias is None else {"bias": torch.zeros_like(bias)}
        with _AllDouble():
            at_zero, at_one, at_weight = (
                functional_call(self.modules[source], {"weight": w, **no_bias}, args, kwargs)
                for w in (torch.zeros_like(weight), torch.ones_like(weight), weight)
            )
        slope = at_one - at_zero
        offset = round(float((at_zero * slope).sum() / slope.square().sum()), 9) if slope.any() else 0.0
        is_affine = (at_weight - (weight + offset) * slope).norm() < SAME * slope.norm()
        return offset if bool(is_affine) else None

    def is_norm(self, name: str) -> bool:
        """Whether this is a leaf with a 1-D weight and no other parameter than a bias."""
        return is_norm(self.modules[name])

    @property
    def hidden_size(self) -> int:
        """Channels of the residual stream, H."""
        return self._inputs[0].shape[-1]

    def num_channels(self, name: str, rows: slice = slice(None)) -> int:
        """How many output channels, of these, a norm or linear has."""
        return len(range(self._parameters(name)[0].shape[0])[rows])

    def has_biases(self, *names: str) -> bool:
        """True if all these modules have a bias, which a shift needs."""
        return all(self._parameters(name)[1] is not None for name in names)

    def _operands(self, attention: Attention) -> dict[Operand, tuple[str, slice]]:
        found: dict[Operand, tuple[str, slice]] = {}
        width = attention.head_dim
        before = takewhile(lambda name: name != attention.name, self._calls)
        for source in (name for name in before if name in self.sources and not self.num_channels(name) % width):
            count = self.num_channels(source) // width
            factor = self._factors(count)  # one for each head: RoPE stays within a head
            calls = self._probe({source: (factor.repeat_interleave(width), slice(None))})[attention.name]
            for index, operand in enumerate(_OPERANDS):
                head = match_channels(_heads(self._calls[attention.name], index), _heads(calls, index), factor)
                if int(head[0]) < 0:
                    continue
                one_each = (head[0] + self._count(len(head) // width)).repeat_interleave(width)
                if torch.equal(head, torch.zeros_like(head) if self.is_norm(source) else one_each):
                    rows = slice(int(head[0]) * width, (int(head[-1]) + 1) * width)
                    found[operand] = source, slice(None) if rows == slice(0, count * width) else rows
        return found

    def _draw_inputs(self, x: Tensor) -> None:
        """Draw random inputs until every linear has run and has read something in each of its channels."""
        self._inputs: list[Tensor] = []
        self._calls: dict[str, list[_Call]] = {}
        self._attending: set[str] = set()
        linears = {name for name, module in self.modules.items() if isinstance(module, nn.Linear)}
        for _ in range(MAX_DRAWS):
            self._inputs.append(torch.randn(x.shape, generator=self._generator, device=x.device, dtype=torch.float64))
            for name, calls in self._watch(self._inputs[-1:]).items():
                self._calls.setdefault(name, []).extend(calls)
            if linears <= set(self._calls) and all(bool(_tokens(self._calls[n]).any(0).all()) for n in linears):
                return
        if unused := linears - set(self._calls):
            raise ValueError(
                f"{MAX_DRAWS} random inputs did not run these linears of {type(self.block).__name__}, so what they "
                f"read is unknown: {', '.join(sorted(unused))}. Pass a longer x if they are experts that no token was "
                "sent to; remove them if the block never uses them."
            )

    def _probe(self, factors: Mapping[str, tuple[Tensor, slice]]) -> dict[str, list[_Call]]:
        """What modules are called with when these multiply their output channels, by name: factors [C] and channels.

        All else that modules write is held as it was: so it is after a fold, and a router sends each token to the same
        experts.
        """
        with contextlib.ExitStack() as stack:
            for name, calls in self._calls.items():
                if name in self._attending:
                    continue
                factor: Tensor | float = 1.0
                if name in factors:
                    values, rows = factors[name]
                    factor = values.new_ones(self.num_channels(name))
                    factor[rows] = values
                hook = Replay([call.output for call in calls], factor)
                stack.callback(self.modules[name].register_forward_hook(hook).remove)
            return self._watch(self._inputs)

    def _watch(self, inputs: Sequence[Tensor]) -> dict[str, list[_Call]]:
        """Every call of every norm, linear, other reader and attention, by name in the order they first run."""
        calls: dict[str, list[_Call]] = {}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = _Call(*map_tensors(Tensor.clone, (args, kwargs)))
            calls.setdefault(self._names[module], []).append(call._replace(came=next(iter(args), None)))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            called = calls[self._names[module]]
            called[-1] = called[-1]._replace(output=map_tensors(Tensor.clone, output), gave=output)

        def attention(module: nn.Module, *operands: Tensor) -> None:
            self._attending.add(self._names[module])
            calls.setdefault(self._names[module], []).append(_Call(map_tensors(Tensor.clone, operands), {}))

        with contextlib.ExitStack() as stack:
            for module in self.modules.values():
                if _is_reader(module) or is_norm(module):
                    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(after).remove)
            stack.enter_context(watching_attention(attention))
            for x in inputs:
                self._run(x)
        return calls

    @torch.no_grad()
    def _run(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        with _AllDouble():
            output = functional_call(self.block, dict(parameters or {}), (x,), self._kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _parameters(self, name: str) -> tuple[Tensor, Tensor | None]:
        module = self.modules[name]
        return module.get_parameter("weight"), getattr(module, "bias", None)

    @property
    def _device(self) -> torch.device:
        return self._generator.device

    def _count(self, end: int) -> Tensor:
        return torch.arange(end, device=self._device)

    def _uniform(self, count: int, low: float, high: float) -> Tensor:
        values = torch.empty(count, dtype=torch.float64, device=self._device)
        return values.uniform_(low, high, generator=self._generator)

    def _factors(self, count: int) -> Tensor:
        """Distinct factors in random order.

        All above 1, so that what did not move never matches; jittered, so that products do not either.
        """
        rung = torch.randperm(count, generator=self._generator, device=self._device)
        return (0.1 + (rung + self._uniform(count, 0, 0.5)) / count).exp()

    def _matrices(self, count: int, size: int) -> Tensor:
        """Random matrices [count, size, size] with singular values in (1/e, e)."""
        shape = (2, count, size, size)
        normal = torch.randn(shape, dtype=torch.float64, device=self._device, generator=self._generator)
        left, right = torch.linalg.qr(normal).Q
        return left * self._uniform(count * size, -1, 1).exp().unflatten(0, (count, 1, size)) @ right

    def _randomize_(self, module: nn.Module) -> None:
        for name, p in module.named_parameters(recurse=False):
            if not p.is_floating_point():
                continue
            if p.ndim > 1:
                p.normal_(std=(p.shape[0] / p.numel()) ** 0.5, generator=self._generator)  # 1 / sqrt(fan in)
            elif is_norm(module) and name == "weight":
                p.uniform_(0.5, 1.5, generator=self._generator)
            else:
                p.uniform_(-0.5, 0.5, generator=self._generator)


def match_channels(before: Tensor, after: Tensor, factor: Tensor) -> Tensor:
    """Int64 [I]: which factor turned each column of ``before`` into that of ``after``; -1 where none did.

    Args:
        before: [N, I].
        after: [N, I], or another shape if something else happened.
        factor: [C], distinct and positive.
    """
    if before.shape != after.shape:
        return torch.full(before.shape[1:], -1, device=before.device)
    energy = before.square().sum(0)
    found = (before * after).sum(0) / energy  # least squares; NaN for a column of zeros, which then matches nothing
    ordered, index = factor.sort()
    nearest = torch.searchsorted(ordered, found * (1 - SAME)).clamp(max=len(factor) - 1)
    is_scaled = (after - found * before).norm(dim=0) <= SAME * found.abs() * energy.sqrt()
    is_factor = (ordered[nearest] - found).abs() <= SAME * found
    return index[nearest].where(is_scaled & is_factor, -1)


class _AllDouble(TorchFunctionMode):
    """Turns every cast to, and creation in, a floating dtype into float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def _tokens(calls: Sequence[_Call]) -> Tensor:
    """What a reader read: [N, I], all calls below one another."""
    return torch.cat([next(iter((*call.args, *call.kwargs.values()))).flatten(0, -2) for call in calls])


def _heads(calls: Sequence[_Call], operand: int) -> Tensor:
    """What attention read as its first, second or third operand: [N, h d]."""
    return torch.cat([call.args[operand].transpose(1, 2).flatten(2).flatten(0, 1) for call in calls])


def _attention(name: str, call: _Call) -> Attention:
    query, key, _ = call.args
    return Attention(name, query.shape[1], key.shape[1], query.shape[3])


def is_norm(module: nn.Module) -> bool:
    """Whether this is a leaf with a 1-D weight and no other parameter than a bias."""
    dimensions = _dimensions(module)
    return dimensions.get("weight") == 1 and set(dimensions) <= {"weight", "bias"}


def _is_reader(module: nn.Module) -> bool:
    """A linear, or a leaf with a weight [E, I] that may be used like one."""
    return _dimensions(module).get("weight") == 2 and not isinstance(module, nn.Embedding)


def _dimensions(module: nn.Module) -> dict[str, int]:
    """Number of dimensions of every parameter of a leaf; nothing for other modules."""
    is_leaf = next(module.children(), None) is None
    return {name: p.ndim for name, p in module.named_parameters(recurse=False)} if is_leaf else {}
