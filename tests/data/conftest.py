"""What every test of a text source is held to, and a file of token ids."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def global_random_state_is_untouched() -> Any:
    states: Any = [torch.get_rng_state, lambda: torch.from_numpy(np.random.get_state(legacy=False)["state"]["key"])]
    before, python_before = [state() for state in states], random.getstate()
    yield
    assert all(torch.equal(state(), old) for state, old in zip(states, before, strict=True))
    assert random.getstate() == python_before


@pytest.fixture
def ids_file(tmp_path: Path) -> str:
    tensors = {
        "calibration_ids": torch.arange(12, dtype=torch.int32).view(4, 3),
        "evaluation_ids": torch.arange(100, 110).view(2, 5),
        "floats": torch.zeros(2, 2),
        "flat": torch.arange(3),
        "empty": torch.zeros(0, 3, dtype=torch.int64),
        "foreign": torch.tensor([[5, 300]]),
        "negative": torch.tensor([[5, -100]]),
    }
    save_file(tensors, tmp_path / "ids.safetensors")
    return str(tmp_path / "ids.safetensors")
