"""Run-time operations in a quantized model: children of the modules they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from plquant.nn.attention import AttentionQuantizer
from plquant.nn.kronecker import applied
from plquant.nn.packed_linear import PackedLinear
from plquant.nn.token_norm import TokenNorm
from plquant.transforms import gather_op  # noqa: F401, make_op knows the operations that were imported
from plquant.transforms.online import OnlineOp, make_op


class Online(nn.Sequential):
    """Run-time operations, in order, [..., I] -> [..., I'], on the input or the output of the module they are of.

    Attributes:
        kernels: Do them by kernels where there are some, which sum in an order of their own; a linear that is laid out
            for a GPU's products of integers does in any case.
    """

    at: Where = "input"
    kernels = False

    def forward(self, x: Tensor) -> Tensor:
        """All of them."""
        for op in self:
            x = applied(op, x) if self.kernels else op(x)
        return x

    @contextmanager
    def laid_out(self) -> Iterator[None]:
        """Within it by kernels."""
        wanted, self.kernels = self.kernels, True
        try:
            yield
        finally:
            self.kernels = wanted

    def __iter__(self) -> Iterator[OnlineOp]:
        """One by one."""
        return super().__iter__()  # type: ignore[return-value]


Where = Literal["input", "output"]


def attach_online_(module: nn.Module, ops: Iterable[OnlineOp], at: Where = "output") -> None:
    """Make operations a part of a module, its child ``online``, so that they are saved, loaded and moved with it.

    Args:
        module: A ``PackedLinear``, which then does them to its input before that is quantized; an
            ``AttentionQuantizer``, to queries and keys; a ``TokenNorm`` or any other module to its output.
        ops: The operations, in order.
        at: Whether any other module does them to its input in place of its output.
    """
    online = Online(*ops)
    if not len(online):
        return
    if isinstance(module, PackedLinear | AttentionQuantizer):
        module.online = online
        return
    online.at = at
    if isinstance(module, TokenNorm):
        assert at == "output", "a norm's readers read what its operations give"
        module.online = online
        return
    assert not hasattr(module, "online"), "operations would be done twice"
    module.online = online
    if at == "input":
        module.register_forward_pre_hook(_to_input)
    else:
        module.register_forward_hook(_to_output)


def _to_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.online(args[0]), *args[1:])  # type: ignore[operator]


def _to_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.online(output)  # type: ignore[operator]


def online_entries(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name of every module with run-time operations -> where they are done and what they are, as JSON."""
    return {
        name: {
            "at": module.online.at,
            "ops": [{"kind": op.kind, "config": op.config()} for op in module.online],
        }
        for name, module in model.named_modules()
        if isinstance(getattr(module, "online", None), Online)
    }


def make_ops(entry: dict[str, Any]) -> list[OnlineOp]:
    """The operations of one of ``online_entries``, to load tensors into."""
    return [make_op(op["kind"], op["config"]) for op in entry["ops"]]
