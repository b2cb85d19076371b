"""Products of bfloat16 on a CPU without AVX512, where torch multiplies them number by number.

Widened they are the same numbers, float32 products of them are eight times as fast, and the result is rounded once, as
where bfloat16 is multiplied: only the order of the additions may differ, as it does between any two machines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
PRODUCTS = {
    *[aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default],
    *[ATTENTION, aten._scaled_dot_product_flash_attention_for_cpu_backward.default],
    # What these are made of comes by itself, but not under inference_mode.
    *[aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default],
}


class ThroughFloat32(TorchDispatchMode):
    """Within it products of bfloat16 on the CPU, those of a backward pass too, are computed in float32."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The result of one operation."""
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16 or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        found = func(*tree_map_only(Tensor, _widened, args), **tree_map_only(Tensor, _widened, kwargs))
        if func is ATTENTION:
            return found[0].bfloat16(), found[1]  # the second is float32 always
        return tree_map_only(Tensor, Tensor.bfloat16, found)


def quick_products(device: torch.device) -> AbstractContextManager[Any]:
    """Within it products of bfloat16 are as quick as this machine makes them.

    Args:
        device: Where they are computed. Elsewhere than on a CPU every operation would only be held up.
    """
    return nullcontext() if device.type != "cpu" or is_native() else ThroughFloat32()


def is_native() -> bool:
    """Whether torch has quick products of bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
