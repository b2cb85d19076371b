"""Kernels run in Triton's interpreter here, on CPU tensors; outside of these tests triton compiles as ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Every kernel of ``plquant.kernels`` that the test file has imported runs in the interpreter."""
    pytest.importorskip("triton")
    from bench.interpreter import interpreted

    with interpreted():
        yield
