"""What a method is made of: parts, each doing one thing to a block, in the one order that is legal."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from plquant.blocks.quant_block import QuantBlock
from plquant.nn.fake_quant_linear import FakeQuantLinear
from plquant.quant.affine import QTensor
from plquant.quant.axis import Axis

# Each rests on those before it: a clipping strength learned before a transform would belong to another range, a Hessian
# from before a reassembly to other channels.
LEGAL_ORDER = (
    "scale and shift",
    "rotation",
    "affine matrix",
    "reassembly",
    "low rank",
    "clipping",
    "activation clipping",
    "axis",
    "rounding",
)


class Fitting(Protocol):
    """What a part may ask of the module that fits the block."""

    def observe(self, make: Callable[[int], Metric], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Statistics of the inputs of these linears, or all, in full precision: name -> the metric's value."""

    def observe_quantized(self, make: Callable[[int], Metric | MetricCollection], name: str, final: bool = True) -> Any:
        """A statistic of the inputs of one linear, as the quantized model has them; ``final``: as multiplied."""

    def hessians(self, weighted: bool = True) -> Iterable[tuple[list[str], list[Tensor]]]:
        """Linears that read the same tensor, in the order they run: names, and Hessians of what is multiplied, [I, I].

        Of what the linears before have become by the time it is asked for; ``weighted``: tokens count as they do in the
        block's error.
        """

    def error(self, tokens: int | None = None) -> float:
        """Error of the block as it is now, over about so many tokens or all; see ``token_error``."""


class Part:
    """One thing that a method does to a block; an instance belongs to one block.

    Args:
        block: The block to calibrate.
    """

    place: ClassVar[str]  # in LEGAL_ORDER
    axes: ClassVar[tuple[Axis, ...]] = ()  # along which it may put groups, besides the grid's own
    runs_later: bool = False  # leaves operations that run with the model, on one model or another
    bytes_a_channel: ClassVar[int] = 0  # of these at most, for an input channel of a linear, where the data decides
    changes_model: bool = False  # ``prepare`` changes the blocks
    options: dict[str, Any]  # what it was made with, for the record of the run

    def __new__(cls, *args: Any, **kwargs: Any) -> Part:
        """Note the options."""
        part = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind(part, *args, **kwargs)
        bound.apply_defaults()
        part.options = {key: value for key, value in bound.arguments.items() if key not in ("self", "block")}
        return part

    def __init__(self, block: QuantBlock) -> None:
        self.block = block
        self.notes: list[str] = []  # what the run's report should say, the same for all blocks it happened in

    def check(self, parts: Sequence[Part]) -> None:
        """Whether this part can work here, beside these; called before the run too, on a block without sites.

        Raises:
            ValueError: It cannot, with the reason.
        """

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Whether this part can be fitted by it; called before the run too.

        Raises:
            ValueError: It cannot, with the reason.
        """

    def prepare(self, lm: nn.Module, ids: Tensor) -> None:
        """Change the whole model before its blocks are looked at; called on the part of a block that is none of them.

        Args:
            lm: The language model.
            ids: int64 [N, T], the calibration ids.
        """

    def learnables(self) -> dict[float, list[nn.Parameter]]:
        """Learning rate -> parameters."""
        return {}

    def start(self, fitting: Fitting) -> None:
        """Set what starts from the data; called once, before the first step."""

    def figures(self) -> dict[str, float]:
        """What to log and report of it at the end of the fit, the best epoch in place."""
        return {}

    def advance(self, epoch: int, epochs: int, optimizer: torch.optim.Optimizer) -> None:
        """Called before every epoch, counted from 0, of so many."""

    def resume(self, epoch: int, epochs: int, optimizer: torch.optim.Optimizer) -> None:
        """Called where a fit goes on inside an epoch, with the optimizer's state in place, and not ``advance``."""


class Rounding(Part):
    """The last part: codes of a linear whose other parts are fitted. This one rounds to nearest."""

    place = "rounding"
    wants_hessian: bool = False
    weighs_tokens: bool = True  # of that: as they count in the block's error
    fits_inputs: bool = False  # codes are fitted to the inputs that gave it: less error on these than on others

    def round(self, linear: FakeQuantLinear, hessian: Tensor | None) -> QTensor:
        """The codes.

        Args:
            linear: The linear, its parts fitted.
            hessian: Of what is multiplied with its weight, [I, I], if this part asks for it.
        """
        return linear.quantize()


def check_rate(part: str, option: str, lr: float, usual: float) -> None:
    """Refuse what is no learning rate.

    Args:
        part: Name of the part.
        option: Name of the preset's option that sets it.
        lr: What was given.
        usual: A sensible value.

    Raises:
        ValueError: It is negative, infinite or no number.
    """
    if not 0 <= lr < math.inf:
        raise ValueError(
            f"{part}'s lr={lr} (--model.method.{option}) is not a learning rate; choose 0 or more, such as {usual}"
        )


MakePart: TypeAlias = Callable[[QuantBlock], Part]


def check_order(parts: Sequence[Part]) -> None:
    """Refuse parts out of order, twice, or in a combination that cannot work.

    Raises:
        ValueError: With the reason.
    """
    names = " -> ".join(f"{type(part).__name__} ({part.place})" for part in parts)
    places = [LEGAL_ORDER.index(part.place) for part in parts]
    if places != sorted(places):
        raise ValueError(f"--model.method.parts={names} is not in the legal order, which is {' -> '.join(LEGAL_ORDER)}")
    if len(set(places)) < len(places):
        raise ValueError(f"--model.method.parts={names} has two parts in one place; give one")
    for part in parts:
        part.check(parts)
