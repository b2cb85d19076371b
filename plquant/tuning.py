"""Scales of a finished checkpoint, tuned end to end (EfficientQAT, arXiv 2407.11062): codes and format stay."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from plquant.bfloat16 import quick_products
from plquant.data.base import TextData, ids_sha256
from plquant.files import sha256, write_json
from plquant.formats.checkpoint import INDEX, index_of, save_tensors, tensor_names
from plquant.manifest import MANIFEST, damaged_files, read_manifest, tensor_checksums, write_manifest
from plquant.methods.rtn import RTN
from plquant.model import QuantizedLM
from plquant.nn.packed_linear import PackedLinear
from plquant.nn.tuned_linear import TunedLinear
from plquant.packed_model import load
from plquant.report import duration
from plquant.run_folder import DATA_SHA256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TUNED = "tuned.json"
Loss = Literal["kl", "lm"]
# Letters: N calibration windows, B of them in a batch, T tokens of a window, V vocabulary.


@dataclass
class Tuned:
    """What a tuning did.

    Attributes:
        source: Folder that was tuned.
        loss: What was minimized.
        teacher: The original model, where ``loss`` is ``kl``.
        before: Loss on the held-out windows with the scales as they were.
        after: With those that were written; never more.
        losses: After every epoch.
        best_epoch: Whose scales were written, counted from 1; 0 for those there were.
        windows: Calibration windows trained on, and held out.
        tokens_sha256: Of all of them.
        lr: Learning rate.
        seconds: Of the fit.
    """

    source: str
    loss: Loss
    teacher: str | None
    before: float
    after: float
    losses: list[float]
    best_epoch: int
    windows: tuple[int, int]
    tokens_sha256: str
    lr: float
    seconds: float = field(default=0.0)


class ScaleTuning(L.LightningModule):
    """Trains the scales of a packed model, for ``Trainer.fit``.

    Args:
        lm: A model whose linears are packed and not laid out for kernels; its linears are exchanged until ``fold_``.
        teacher: The original model, whose predictions are the target; ``None`` takes the text's own tokens.
        lr: Learning rate: about the share by which a scale may change in a step.
    """

    def __init__(self, lm: PreTrainedModel, teacher: PreTrainedModel | None, lr: float) -> None:
        super().__init__()
        self.lm, self.lr = lm, lr
        self.teacher = [teacher]  # no submodule: it is no part of what is trained or saved
        self.linears = {name: m for name, m in lm.named_modules() if isinstance(m, PackedLinear)}
        self.tuned = {name: TunedLinear(linear) for name, linear in self.linears.items()}
        for name, linear in self.tuned.items():
            lm.set_submodule(name, linear)
        self.eval()  # without dropout
        self.losses: list[float] = []  # on the held-out windows; the first before any step
        self._best = [linear.log_change.detach().clone() for linear in self.tuned.values()]
        self._loss = MeanMetric(nan_strategy="disable")

    def on_validation_start(self) -> None:
        """The teacher goes where the model is."""
        if self.teacher[0] is not None:
            nn.Module.to(self.teacher[0], self.device)

    @property
    def best_epoch(self) -> int:
        """The number of the epoch whose scales are kept, 0 for those of the start; a NaN is never the best."""
        return min(range(len(self.losses)), key=lambda i: (self.losses[i] != self.losses[i], self.losses[i]))

    def loss(self, ids: Tensor) -> Tensor:
        """Of windows [B, T], a mean over the predicted tokens."""
        logits = self.lm(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        teacher = self.teacher[0]
        if teacher is None:
            return F.cross_entropy(logits.float(), ids[:, 1:].flatten())
        with torch.no_grad():
            target = teacher(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
        return F.kl_div(logits.float().log_softmax(-1), target, log_target=True, reduction="batchmean")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.loss(batch)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch."""
        self._loss.reset()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Take in a batch of held-out windows."""
        self._loss.update(self.loss(batch).detach(), len(batch))

    def on_validation_epoch_end(self) -> None:
        """Remember the scales if these are the best so far."""
        self.losses.append(float(self._loss.compute()))
        self.log("held_out", self.losses[-1], prog_bar=True)
        if self.best_epoch == len(self.losses) - 1:
            self._best = [linear.log_change.detach().clone() for linear in self.tuned.values()]

    def configure_optimizers(self) -> Any:
        """AdamW without decay; the rate falls to zero along a cosine."""
        parameters = [linear.log_change for linear in self.tuned.values()]
        optimizer = torch.optim.AdamW(parameters, self.lr, weight_decay=0.0)
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def fold_(self) -> dict[str, Tensor]:
        """Put the packed linears back, with the best scales; returns these, by their names in the checkpoint."""
        for linear, best in zip(self.tuned.values(), self._best, strict=True):
            linear.log_change.copy_(best)
        for name, linear in self.tuned.items():
            self.lm.set_submodule(name, linear.fold_())
        return {f"{name}.weight_scale": linear.weight_scale for name, linear in self.linears.items()}


def tune(
    folder: str | Path,
    data: TextData,
    trainer: L.Trainer,
    output_dir: str | Path = "tuned",
    loss: Loss = "kl",
    teacher: str | None = None,
    lr: float = 1e-3,
    held_out: float = 0.125,
) -> Tuned:
    """Train the scales of a quantized model on its loss as a whole, and write it to another folder.

    Codes, zero-points and everything else stay as they are, and so does the format. What is written is the best of all
    epochs and of the start, on calibration windows that are held out.

    Args:
        folder: Output folder of a finished run.
        data: The text to train on; better not the windows that the run was calibrated on.
        trainer: Its ``max_epochs`` are passes over that text.
        output_dir: Folder of the tuned model, new or empty; it is there when all of it is.
        loss: ``kl`` follows the predictions of the original model, ``lm`` the tokens of the text.
        teacher: The original model, for ``kl``; the one that the run quantized if not given.
        lr: Learning rate: about the share by which a scale may change in a step.
        held_out: Share of the calibration windows that is not trained on and decides which epoch is best.

    Raises:
        ValueError: The folder holds no finished run, or is damaged; or an option cannot work.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    recipe = _check(folder, output_dir, loss, lr, held_out)
    original = None
    if loss == "kl":
        original = QuantizedLM(teacher or recipe["model"]["checkpoint"], RTN)
        if original.is_quantized:
            raise ValueError(f"--teacher={original.checkpoint} is quantized already; give the original model")
    model = QuantizedLM(str(folder), RTN)
    data.trainer = trainer
    ids = data.calibration_ids(original or model)
    if ids_sha256(ids) == recipe["data"].get(DATA_SHA256):
        print(
            "note: these are the windows that the run was calibrated on. It fits them better than other text: little "
            "is left to learn, and the held-out ones are not new to it; give others (--data.seed, or another text)"
        )
    held = max(1, round(len(ids) * held_out))
    if held >= len(ids):
        raise ValueError(
            f"--held_out={held_out} of {len(ids)} calibration windows leaves none to train on; give more windows "
            "(--data.num_samples) or a smaller share"
        )
    lm = load(folder, model.load_dtype, kernels=False)
    module = ScaleTuning(lm, None if original is None else original.lm, lr)
    rows: Any = ids
    training = DataLoader(rows[held:], data.batch_size, shuffle=True)
    validation = DataLoader(rows[:held], data.batch_size)
    started = time.monotonic()
    with quick_products(trainer.strategy.root_device):
        trainer.validate(module, validation, verbose=False)
        trainer.fit(module, training, validation)
    best = module.best_epoch
    done = Tuned(
        source=str(folder),
        loss=loss,
        teacher=None if original is None else original.checkpoint,
        before=module.losses[0],
        after=module.losses[best],
        losses=module.losses[1:],
        best_epoch=best,
        windows=(len(ids) - held, held),
        tokens_sha256=ids_sha256(ids),
        lr=lr,
        seconds=time.monotonic() - started,
    )
    write_tuned(folder, output_dir, module.fold_(), done)
    return done


def write_tuned(folder: Path, output_dir: Path, changed: dict[str, Tensor], done: Tuned) -> None:
    """Write a copy of a finished folder with some tensors changed; it gets its name when all of it is there.

    Args:
        folder: The finished folder.
        output_dir: The new one.
        changed: Name -> tensor of the same shape and dtype.
        done: What is said of it in ``tuned.json``, the certificate and the model card.
    """
    from safetensors.torch import load_file

    manifest = read_manifest(folder)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{output_dir.name}.", dir=output_dir.parent) as temporary:
        new = Path(temporary) / "folder"
        new.mkdir()
        files, tensors = {}, {}
        for name in manifest["files"]:
            if name in manifest["tensors"]:
                shard = load_file(folder / name)
                shard |= {key: changed[key].to(shard[key].dtype).cpu() for key in shard.keys() & changed.keys()}
                save_tensors(new / name, shard)
                (new / name).chmod((folder / name).stat().st_mode)  # safetensors makes its files private
                tensors[name] = tensor_checksums(shard)
            elif name != INDEX:
                (new / name).parent.mkdir(exist_ok=True)
                shutil.copy2(folder / name, new / name)
        write_json(new / TUNED, asdict(done))
        with open(new / "README.md", "a") as card:
            card.write(f"\n## Tuned end to end\n\n{said(done)} Other figures on this page are of before.\n")
        for name in (*(name for name in manifest["files"] if name != INDEX), TUNED):
            files[name] = sha256(new / name)
        write_json(new / INDEX, index_of(new, list(tensors)))
        files[INDEX] = sha256(new / INDEX)
        write_manifest(new, manifest["made"] | {"tuned": asdict(done)}, files, tensors)
        if output_dir.is_dir():
            output_dir.rmdir()  # empty, or it would have been refused
        new.rename(output_dir)


def said(done: Tuned) -> str:
    """A tuning in a sentence."""
    what = "distance from the original's predictions" if done.loss == "kl" else "loss"
    return (
        f"Scales tuned for {len(done.losses)} epochs on {done.windows[0]} windows: {what} {done.before:.4f} -> "
        f"{done.after:.4f} nats a token on {done.windows[1]} held-out windows, {duration(done.seconds)}."
    )


def _check(folder: Path, output_dir: Path, loss: Loss, lr: float, held_out: float) -> dict[str, Any]:
    """Refuse what cannot work before the long work; the recipe of the run."""
    if loss not in ("kl", "lm"):
        raise ValueError(f"--loss={loss} is not known; choose kl or lm")
    if not 0 < lr < float("inf"):
        raise ValueError(f"--lr={lr} is not a learning rate; choose more than 0, such as 0.001")
    if not 0 < held_out < 1:
        raise ValueError(f"--held_out={held_out} is not a share; choose more than 0 and less than 1, such as 0.125")
    missing = [name for name in (INDEX, MANIFEST, "recipe.json") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {' and no '.join(missing)}: give the output folder of a finished run")
    if damage := damaged_files(folder, read_manifest(folder)):
        raise ValueError(f"{folder} is damaged: {'; '.join(damage)}")
    tensor_names(folder)
    if output_dir.is_file() or (output_dir.is_dir() and any(output_dir.iterdir())):
        raise ValueError(f"--output_dir={output_dir} is there already; give a new or empty folder")
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    parent = next(p for p in output_dir.absolute().parents if p.is_dir())
    if (free := shutil.disk_usage(parent).free) < size:
        raise OSError(
            f"--output_dir={output_dir} needs {size / 2**30:.2f} GiB, but {parent} has {free / 2**30:.2f} GiB free"
        )
    recipe: dict[str, Any] = json.loads((folder / "recipe.json").read_text())
    return recipe
