"""Find the decoder blocks of a model, and the places in a block where a transform may be folded.

No table of architectures: a place is proposed by watching which linears an output reaches, and accepted only if
folding random numbers there leaves the block's output where it was.
"""

# Letters: B batch, T tokens, H hidden size, C channels of a source, I input channels of a consumer, N = B T.

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from plquant.transforms.scale_shift import fold_consumer, fold_source

# Random inputs drawn, at most, until every linear has run and every channel has been seen non-zero (ReLU, experts).
MAX_DRAWS = 64
# Two float64 factors closer than this (relative) are the same one. The factors used lie at least 1 / C apart.
SAME = 1e-9

_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Site:
    """A place where a per-channel transform folds: the block computes the same function after it.

    Attributes:
        source: Name of the norm or linear in the block.
        consumers: Names of the linears whose input channels are the source's output channels, in the order they run.
        channel: int64 [I]; input channel j of every consumer reads channel ``channel[j]`` of the source. The identity,
            or repeated heads under grouped-query attention.
        kind: What the source is.
        admits_shift: Proven for a shift too; otherwise for a positive scale only.
        error: Measured in the proof: move of the block's output over the norm of what the block adds to its input.
        gain_offset: 1.0 for a norm that multiplies by ``1 + weight``, else 0.0.
    """

    source: str
    consumers: tuple[str, ...]
    channel: Tensor
    kind: Literal["norm", "linear"]
    admits_shift: bool
    error: float
    gain_offset: float = 0.0

    def inside(self, parent: str) -> Site:
        """The same site with its modules named from a module around the block."""
        consumers = tuple(f"{parent}.{name}" for name in self.consumers)
        return replace(self, source=f"{parent}.{self.source}", consumers=consumers)


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
    """Key that is equal for blocks with the same module names, classes and parameter shapes, hence the same sites."""
    return tuple(
        (name, type(module), tuple((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)))
        for name, module in block.named_modules()
    )


@torch.no_grad()
def find_sites(block: nn.Module, x: Tensor, kwargs: Mapping[str, Any], tolerance: float = 1e-9) -> list[Site]:
    """Sites of a block in the order their sources run, each with all its consumers and each proven.

    Multiply the output of one norm or linear by a different factor per channel. Linears whose input channels each moved
    by one of these factors, the same for every token, are its consumers, and the factors say which channel went
    where. Folding a random scale there must then leave the block's output alone, which also refuses an output that
    something else reads too.

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
    proof = Proof(block, x, kwargs)
    sites: list[Site] = []
    for source in proof.ran:
        offset = proof.gain_offset(source)
        consumers, channel = proof.consumers(source)
        if offset is None or channel is None:
            continue
        if any(set(consumers) & set(site.consumers) for site in sites):
            continue  # a ReLU passes positive scales, so gate and up both reach down; one input, one transform
        error = proof.error(source, consumers, channel, offset)
        if not error < tolerance:  # a NaN is no proof
            continue
        admits_shift = proof.has_biases(source, *consumers) and (
            proof.error(source, consumers, channel, offset, with_shift=True) < tolerance
        )
        kind: Literal["norm", "linear"] = "norm" if _is_norm(proof.modules[source]) else "linear"
        sites.append(Site(source, consumers, channel.cpu(), kind, admits_shift, error, offset))
    return sites


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
        modules: The modules of the copy by name.
        ran: Names of its norms and linears, in the order they run.
    """

    @torch.no_grad()
    def __init__(self, block: nn.Module, x: Tensor, kwargs: Mapping[str, Any], seed: int = 0) -> None:
        if x.ndim != 3 or x.shape[1] < 2:
            raise ValueError(
                f"x has shape {list(x.shape)}; a proof needs hidden states [batch, tokens, hidden] of two tokens or "
                "more, or attention has nothing to mix. Pass a longer sequence and the arguments that go with it."
            )
        self._generator = torch.Generator(x.device).manual_seed(seed)
        self._copy = copy.deepcopy(block).double().eval()
        self._kwargs = map_tensors(lambda t: t.double() if t.is_floating_point() else t, dict(kwargs))
        self.modules = dict(self._copy.named_modules())
        for module in self.modules.values():
            module._forward_pre_hooks.clear()  # they belong to whoever watches the original
            module._forward_hooks.clear()
            self._randomize_(module)
        self._draw_inputs(x)
        self._outputs = [self._run(x) for x in self._inputs]
        self.ran = list(self._calls)

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
    def error(
        self, source: str, consumers: Sequence[str], channel: Tensor, gain_offset: float = 0.0, with_shift: bool = False
    ) -> float:
        """Relative move of the output by folding a random scale in (1/e, e), and shift if asked, at this place."""
        scale = self._uniform(_num_channels(self.modules[source]), -1, 1).exp()
        shift = self._uniform(len(scale), -1, 1) if with_shift else None
        channel = channel.to(scale.device)
        folded = {source: fold_source(*self._parameters(source), scale, shift, gain_offset)}
        for name in consumers:
            shift_in = None if shift is None else shift[channel]
            folded[name] = fold_consumer(*self._parameters(name), scale[channel], shift_in)
        parameters = {f"{name}.weight": weight for name, (weight, _) in folded.items()}
        parameters |= {f"{name}.bias": bias for name, (_, bias) in folded.items() if bias is not None}
        return self.move(parameters)

    @torch.no_grad()
    def consumers(self, source: str) -> tuple[tuple[str, ...], Tensor | None]:
        """Linears that read the source's channels, each scaled by nothing but itself, and their channel map [I].

        No map if there are none, or if they read the channels in different orders, which one site cannot say.
        """
        count = _num_channels(self.modules[source])
        # All above 1, so that an input that did not move never matches; jittered, so that products do not either.
        rung = torch.randperm(count, generator=self._generator, device=self._generator.device)
        factor = (0.1 + (rung + self._uniform(count, 0, 0.5)) / count).exp()
        with _hooks([self.modules[source].register_forward_hook(lambda module, args, output: output * factor)]):
            calls = self._watch(self._inputs)
        maps: dict[str, Tensor] = {}
        for name in self.ran:
            if isinstance(self.modules[name], nn.Linear) and name in calls:
                channel = match_channels(_tokens(self._calls[name]), _tokens(calls[name]), factor)
                if channel is not None:
                    maps[name] = channel
        channels = list(maps.values())
        if not channels or not all(torch.equal(channel, channels[0]) for channel in channels):
            return (), None
        return tuple(maps), channels[0]

    @torch.no_grad()
    def gain_offset(self, source: str) -> float | None:
        """``a`` of a norm that multiplies by ``weight + a``, found by asking it at weight 0 and 1; None for any other.

        0.0 for a linear.
        """
        module = self.modules[source]
        if not _is_norm(module):
            return 0.0
        args, kwargs = self._calls[source][0]
        weight, bias = self._parameters(source)
        no_bias = {} if bias is None else {"bias": torch.zeros_like(bias)}
        with _AllDouble():
            at_zero, at_one, at_weight = (
                functional_call(module, {"weight": w, **no_bias}, args, kwargs)
                for w in (torch.zeros_like(weight), torch.ones_like(weight), weight)
            )
        slope = at_one - at_zero
        offset = round(float((at_zero * slope).sum() / slope.square().sum()), 9) if slope.any() else 0.0
        is_affine = (at_weight - (weight + offset) * slope).norm() < SAME * slope.norm()
        return offset if bool(is_affine) else None

    def has_biases(self, *names: str) -> bool:
        """True if all these modules have a bias, which a shift needs."""
        return all(self._parameters(name)[1] is not None for name in names)

    def _draw_inputs(self, x: Tensor) -> None:
        """Draw random inputs until every linear has run and has read something in each of its channels."""
        self._inputs: list[Tensor] = []
        self._calls: dict[str, list[_Call]] = {}
        linears = {name for name, module in self.modules.items() if isinstance(module, nn.Linear)}
        for _ in range(MAX_DRAWS):
            self._inputs.append(torch.randn(x.shape, generator=self._generator, device=x.device, dtype=torch.float64))
            for name, calls in self._watch(self._inputs[-1:]).items():
                self._calls.setdefault(name, []).extend(calls)
            if linears <= set(self._calls) and all(bool(_tokens(self._calls[n]).any(0).all()) for n in linears):
                return
        if unused := linears - set(self._calls):
            raise ValueError(
                f"{MAX_DRAWS} random inputs did not run these linears of {type(self._copy).__name__}, so what they "
                f"read is unknown: {', '.join(sorted(unused))}. Pass a longer x if they are experts that no token was "
                "sent to; remove them if the block never uses them."
            )

    def _watch(self, inputs: Sequence[Tensor]) -> dict[str, list[_Call]]:
        """Arguments of every call of every norm and linear, in the order they first run."""
        calls: dict[str, list[_Call]] = {}

        def record(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, []).append(map_tensors(Tensor.clone, (args, kwargs)))

        watched = [(name, m) for name, m in self.modules.items() if isinstance(m, nn.Linear) or _is_norm(m)]
        with _hooks(
            m.register_forward_pre_hook(lambda m, a, k, name=name: record(name, a, k), with_kwargs=True)
            for name, m in watched
        ):
            for x in inputs:
                self._run(x)
        return calls

    def _run(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        with _AllDouble():
            output = functional_call(self._copy, dict(parameters or {}), (x,), self._kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _parameters(self, name: str) -> tuple[Tensor, Tensor | None]:
        module = self.modules[name]
        return module.get_parameter("weight"), getattr(module, "bias", None)

    def _uniform(self, count: int, low: float, high: float) -> Tensor:
        device = self._generator.device
        return torch.empty(count, dtype=torch.float64, device=device).uniform_(low, high, generator=self._generator)

    def _randomize_(self, module: nn.Module) -> None:
        for name, p in module.named_parameters(recurse=False):
            if not p.is_floating_point():
                continue
            if p.ndim > 1:
                p.normal_(std=(p.shape[0] / p.numel()) ** 0.5, generator=self._generator)  # 1 / sqrt(fan in)
            elif _is_norm(module) and name == "weight":
                p.uniform_(0.5, 1.5, generator=self._generator)
            else:
                p.uniform_(-0.5, 0.5, generator=self._generator)


def match_channels(before: Tensor, after: Tensor, factor: Tensor) -> Tensor | None:
    """Int64 [I]: which factor turned each column of ``before`` into that of ``after``; None unless all have one.

    Args:
        before: [N, I].
        after: [N, I], or another shape if something else happened.
        factor: [C], distinct and positive.
    """
    if before.shape != after.shape:
        return None
    energy = before.square().sum(0)
    found = (before * after).sum(0) / energy  # least squares; NaN for a column of zeros, which then matches nothing
    if not bool(((after - found * before).norm(dim=0) <= SAME * found.abs() * energy.sqrt()).all()):
        return None
    ordered, index = factor.sort()
    nearest = torch.searchsorted(ordered, found * (1 - SAME)).clamp(max=len(factor) - 1)
    if not bool(((ordered[nearest] - found).abs() <= SAME * found).all()):
        return None
    return index[nearest]


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


@contextlib.contextmanager
def _hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with every tensor in it, also inside dicts, tuples and lists, replaced by ``function`` of it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def _tokens(calls: Sequence[_Call]) -> Tensor:
    """What a linear read: [N, I], all calls below one another."""
    return torch.cat([next(iter((*args, *kwargs.values()))).flatten(0, -2) for args, kwargs in calls])


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear) for m in module.modules())


def _is_norm(module: nn.Module) -> bool:
    """A leaf with a 1-D weight and no other parameter than a bias."""
    dimensions = {name: p.ndim for name, p in module.named_parameters(recurse=False)}
    is_leaf = next(module.children(), None) is None
    return is_leaf and dimensions.get("weight") == 1 and set(dimensions) <= {"weight", "bias"}


def _num_channels(module: nn.Module) -> int:
    return module.get_parameter("weight").shape[0]
