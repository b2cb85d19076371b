"""The optimizer of a method: chosen in one line, recorded, and refused before the run where it cannot work."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plquant.methods import Best, OmniQuant
from plquant.sign_sgd import SignSGD
from tests.methods.test_block import fit, make_block
from tests.test_cli import calibrate


def test_sign_sgd_is_its_equation() -> None:
    gradients = torch.tensor([[3.0, -1e-9, 0.0], [-1.0, -1.0, 2.0], [-1.9, 0.5, 0.0]], dtype=torch.float64)
    plain, heavy, still = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(3))
    optimizer = SignSGD([{"params": [plain, still], "lr": 0.5}, {"params": [heavy], "lr": 0.25, "momentum": 0.5}])
    signs = []
    for gradient in gradients:
        plain.grad, heavy.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        signs.append((plain.tolist(), heavy.tolist()))
    # m is (3, -1e-9, 0), then (0.5, -1 - 5e-10, 2), then (-1.65, -2.5e-10, 1)
    assert signs == [
        ([-0.5, 0.5, 0.0], [-0.25, 0.25, 0.0]),
        ([0.0, 1.0, -0.5], [-0.5, 0.5, -0.25]),
        ([0.5, 0.5, -0.5], [-0.25, 0.75, -0.5]),
    ]
    assert not still.any() and plain not in optimizer.state
    with pytest.raises(ValueError, match="momentum=1"):
        SignSGD([plain], momentum=1)


@pytest.mark.parametrize("method", [OmniQuant, Best])
def test_the_default_is_adamw_without_decay_to_the_last_bit(method: Any) -> None:
    trained = []
    for own in (False, True):
        torch.manual_seed(0)
        block, x = make_block("llama")
        module = method(block)
        if own:
            module.make_optimizer = lambda _, module=module: torch.optim.AdamW(
                [{"params": p, "lr": lr} for lr, p in module.learnables().items()], weight_decay=0.0, fused=True
            )
        fit(module, x, x, epochs=3)
        trained.append([p.detach().clone() for p in module._trained()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_signed_steps_fit_a_block(momentum: float) -> None:
    block, x = make_block("llama")
    with torch.no_grad(), block.full_precision():
        target = block(x)
    module = OmniQuant(block, lwc_lr=1e-2, alpha=None)
    module.make_optimizer = partial(SignSGD, momentum=momentum)
    before = 0.0

    def start() -> None:
        nonlocal before
        type(module).on_train_start(module)
        before = module._best_loss

    module.on_train_start = start  # type: ignore[method-assign]
    fit(module, x, target)
    assert module._best_loss < 0.9 * before


def test_one_line_on_the_command_line_and_another_optimizer_does_not_go_on(checkpoint: Path, tmp_path: Path) -> None:
    calibrate(checkpoint, tmp_path / "out", "--model.optimizer", "SignSGD", "--model.optimizer.momentum", "0.5")
    found = json.loads((tmp_path / "out" / "recipe.json").read_text())["optimizer"]
    assert found == {"class": "plquant.sign_sgd.SignSGD", "lr": 1e-3, "momentum": 0.5}
    with pytest.raises(SystemExit, match=r"(?s)another run.*optimizer.class: plquant.sign_sgd.SignSGD there, .*AdamW"):
        calibrate(checkpoint, tmp_path / "out")


def test_adamw_of_8_bits_by_its_class_path(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = tmp_path / "optimizer.yaml"
    config.write_text("model: {optimizer: {class_path: bitsandbytes.optim.AdamW8bit, init_args: {weight_decay: 0.0}}}")
    calibrate(checkpoint, tmp_path / "out", "--config", str(config))
    found = json.loads((tmp_path / "out" / "recipe.json").read_text())["optimizer"]
    assert found["class"].endswith("AdamW8bit") and found["weight_decay"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.method", "AffineQuant", "--model.optimizer", "SignSGD"], "SignSGD does not go with Affine"),
        (
            [
                "--model.method",
                "AffineQuant",
                "--model.optimizer",
                "torch.optim.AdamW",
                "--model.optimizer.amsgrad",
                "true",
            ],
            "AdamW with amsgrad does not go with Affine",
        ),
        (["--model.optimizer", "torch.optim.LBFGS"], "takes no groups of parameters"),
    ],
)
def test_what_cannot_fit_is_refused_before_the_run(
    options: list[str], said: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=said):
        calibrate(checkpoint, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_bands_that_open_late_go_with_adam(checkpoint: Path, tmp_path: Path) -> None:
    calibrate(checkpoint, tmp_path / "out", "--model.method", "AffineQuant", "--model.optimizer", "torch.optim.Adam")
