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


@pytest.fixture
def pretended(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is a GPU to whoever asks for kernels: weights are laid out as for one."""
    import torch

    from plquant.kernels import run_time

    kind = run_time.kind
    monkeypatch.setattr(run_time, "kind", lambda device, *rest: kind(torch.device("cuda"), *rest))
    monkeypatch.setattr(run_time, "has_triton", lambda device: True)
