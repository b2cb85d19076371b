"""Triton's interpreter, switched on inside a process that also compiles, and repaired where it is wrong.

``TRITON_INTERPRET`` decides once, when triton is imported, for the whole process. ``interpreted`` decides for a block
of code instead: kernels run on CPU tensors inside it and compile again after it.

Repaired, for triton 3.9 (upstream says that it supports none of this, triton-lang/triton #11584, #11585 and #4972):

- bf16 is kept as raw uint16, and ``*``, ``+``, ``-``, int to bf16, ``tl.dot`` and ``tl.sum`` compute on those integers;
  fp32 to bf16 truncates. Here they compute in fp32 and round to nearest even.
- ``tl.inline_asm_elementwise`` is refused. Here ``bench.ptx`` runs it.
- ``tl.fma`` of fp32 rounds the product. Here it goes through float64.
- ``tl.dot`` of int8 takes numpy's slow integer loop. Here it goes through float64, which is exact.

Not repaired: ``extern_elementwise`` (libdevice), bf16 atomics, bf16 scans.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle
from triton.runtime.jit import JITFunction

from bench import ptx

Array = NDArray[Any]


@contextmanager
def interpreted(*modules: ModuleType) -> Iterator[None]:
    """Run kernels in the interpreter inside this block.

    Args:
        modules: Those with kernels in them, beside all that are loaded of ``plquant.kernels``.
    """
    languages = [module for name, module in sys.modules.items() if name.startswith("triton.language")]
    own = [module for name, module in sys.modules.items() if name.startswith("plquant.kernels")]
    functions: dict[int, InterpretedFunction[Any]] = {}

    def convert(function: JITFunction[Any]) -> InterpretedFunction[Any]:
        return functions.setdefault(id(function), InterpretedFunction(function.fn))

    with ExitStack() as stack:
        # The interpreter leaves its own functions behind in triton.language: all names are put back at the end.
        for space in [*languages, tl.tensor, tl.core.tensor_descriptor_base, *own, *modules]:
            stack.callback(_restore, space, dict(vars(space)))
        stack.callback(setattr, triton.knobs.runtime, "interpret", triton.knobs.runtime.interpret)
        triton.knobs.runtime.interpret = True
        for module in [*languages, *own, *modules]:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    setattr(module, name, convert(value))
        for name, value in list(vars(tl.tensor).items()):
            if isinstance(value, JITFunction):
                setattr(tl.tensor, name, _method(convert(value)))
        for owner, name, value in _repairs():
            stack.enter_context(replaced(owner, name, value))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute inside this block."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _restore(space: Any, names: dict[str, Any]) -> None:
    for name, value in names.items():
        if vars(space).get(name) is not value:
            setattr(space, name, value)


def _method(function: InterpretedFunction[Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


def _repairs() -> list[tuple[Any, str, Any]]:
    """Owner, name and function of each repair, around the functions that stand there now."""
    builder: list[tuple[str, Callable[..., Any]]] = [
        ("binary_op", _binary_op),
        ("unary_op", _unary_op),
        ("ternary_op", _ternary_op),
        ("create_fma", _fma),
        ("cast_impl", _cast),
        ("create_fp_to_fp", _cast),
        ("create_dot", _dot),
    ]
    found = [(InterpreterBuilder, name, make(getattr(InterpreterBuilder, name))) for name, make in builder]
    return [
        *found,
        (InterpreterBuilder, "create_inline_asm", _inline_asm),
        (ReduceOps, "sum", _reduction(ReduceOps.sum)),
        (ReduceOps, "min_max", _reduction(ReduceOps.min_max)),
    ]


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype == tl.bfloat16 and handle.data.dtype == np.uint16


def _widen(data: Array) -> Array:
    """bf16 as uint16 -> fp32."""
    return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrow(data: Array) -> Array:
    """fp32 -> bf16 as uint16, to nearest even."""
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32).reshape(np.shape(data))
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _through_fp32(handles: list[TensorHandle], function: Callable[..., Array]) -> TensorHandle:
    out = function(*(_widen(handle.data) if _is_bf16(handle) else handle.data for handle in handles))
    return TensorHandle(out if out.dtype == np.bool_ else _narrow(out), tl.bfloat16)


def _binary_op(original: Callable[..., Any]) -> Callable[..., Any]:
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if _is_bf16(lhs) and op not in bitwise:
            return _through_fp32([lhs, rhs], op)
        return original(self, lhs, rhs, op)

    return binary_op


def _unary_op(original: Callable[..., Any]) -> Callable[..., Any]:
    def unary_op(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
        return _through_fp32([arg], op) if _is_bf16(arg) else original(self, arg, op)

    return unary_op


def _ternary_op(original: Callable[..., Any]) -> Callable[..., Any]:
    def ternary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
        if _is_bf16(other) and op is not np.where:
            return _through_fp32([lhs, rhs, other], op)
        return original(self, lhs, rhs, other, op)

    return ternary_op


def _fma(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if _is_bf16(z):
            return _through_fp32([x, y, z], lambda a, b, c: a * b + c)
        if z.data.dtype == np.float32:
            return TensorHandle((x.data.astype(np.float64) * y.data + z.data).astype(np.float32), z.dtype.scalar)
        return original(self, x, y, z)

    return create_fma


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, src: TensorHandle, dst_type: Any, *rounding: Any) -> TensorHandle:
        target = dst_type.scalar
        if _is_bf16(src) and target != tl.bfloat16:
            return TensorHandle(_widen(src.data).astype(interpreter._get_np_dtype(target)), target)
        if target == tl.bfloat16 and not _is_bf16(src):
            return TensorHandle(_narrow(src.data.astype(np.float32)), target)
        return original(self, src, dst_type, *rounding)

    return cast


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
        if _is_bf16(a):
            product = np.matmul(_widen(a.data), _widen(b.data))
        elif a.data.dtype == np.int8:
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        else:
            return original(self, a, b, d, *options)
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    return create_dot


def _reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(self: Any, input: Any, *options: Any, **named: Any) -> Any:
        tensor = input[0] if isinstance(input, tuple) else input
        if tensor.dtype.scalar != tl.bfloat16:
            return original(self, input, *options, **named)
        wide = self.to_tensor(_widen(tensor.handle.data), tl.float32)
        result = original(self, wide, *options, **named)
        values, *indices = result if isinstance(result, tuple) else (result,)
        back = self.to_tensor(_narrow(values.handle.data), tl.bfloat16)
        return (back, *indices) if isinstance(result, tuple) else back

    return reduce


class _Results:
    """What ``inline_asm_elementwise`` asks an operation for."""

    def __init__(self, handles: list[TensorHandle]) -> None:
        self.handles = handles

    def get_result(self, index: int) -> TensorHandle:
        return self.handles[index]


def _inline_asm(
    self: Any, asm: str, constraints: str, values: list[TensorHandle], types: list[Any], is_pure: bool, pack: int
) -> _Results:
    """Every operand travels in 32-bit registers of ``pack`` elements."""
    shape = np.broadcast_shapes(*(value.data.shape for value in values))
    widths = {value.data.dtype.itemsize * 8 for value in values} | {t.scalar.primitive_bitwidth for t in types}
    assert widths == {32 // pack}, f"the emulation knows registers of {pack} elements of one width, not {widths} bits"
    size = math.prod(shape)
    names = [constraint.strip() for constraint in constraints.split(",")]
    outputs = sum(name.startswith("=") for name in names)
    registers = {}
    for index, (name, value) in enumerate(zip(names[outputs:], values, strict=True), start=outputs):
        flat = np.broadcast_to(value.data, shape).reshape(-1)
        registers[f"${index}"] = np.concatenate([flat, np.zeros(-size % pack, flat.dtype)]).view(np.uint32)
        if name.isdigit():  # tied to an output
            registers[f"${name}"] = registers[f"${index}"]
    registers = ptx.run(asm, registers, -(-size // pack))
    handles = []
    for index, kind in enumerate(types):
        flat = np.ascontiguousarray(registers[f"${index}"]).view(interpreter._get_np_dtype(kind.scalar))
        handles.append(TensorHandle(flat[:size].reshape(shape), kind.scalar))
    return _Results(handles)
