r"""Train a small Qwen3 on bytes of text, and make windows of ids for bench/quality.py: a model that no preset has seen.

    python bench/second_model.py --text wiki.train.raw wiki.valid.raw --minutes 15 --out out/second_model \
        --evaluation_text wiki.test.raw --ids_out out/second_ids.safetensors

Norms of queries and keys, two query heads to a key head, tied embeddings, one token per byte. The last fiftieth of the
text is held out; its loss is printed at the end. A folder that is there is not trained again: only the ids are made, so
that `--calibration_text` can take another text for the same model. The text that comes with Python is named `builtin`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.scale import byte_tokenizer  # noqa: E402
from plquant.data.builtin import builtin_text  # noqa: E402

SHAPE: dict[str, Any] = {
    **{"vocab_size": 258, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 1024},
    **{"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
}
LENGTH = 256  # tokens of a window: no position is measured that was not trained
HELD_OUT = 0.02
WARM_UP = 0.03  # of the whole training
EVALUATION_WINDOWS, CALIBRATION_WINDOWS = 160, 32


def byte_ids(texts: Iterable[str]) -> Tensor:
    """[n] int64, the texts one after another."""
    tokenizer = byte_tokenizer()
    lines = [line for text in texts for line in text.splitlines(keepends=True)]  # the tokenizer is slow on long ones
    return torch.tensor([token for ids in tokenizer(lines)["input_ids"] for token in ids])


def read(name: str) -> str:
    """The text of a file, or that of the documentation which comes with Python."""
    return builtin_text("calibration") if name == "builtin" else Path(name).read_text(encoding="utf-8")


def windows(ids: Tensor, count: int, what: str) -> Tensor:
    """[count, LENGTH]: evenly spaced over ``ids``."""
    if len(ids) < count * LENGTH:
        sys.exit(f"{what} has {len(ids)} bytes; {count} windows of {LENGTH} need {count * LENGTH}")
    starts = torch.linspace(0, len(ids) - LENGTH, count).long()
    return torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])


class RandomWindows(Dataset[Tensor]):
    """Windows at random places, as many as asked for."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return 10**9  # the trainer says when to stop

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        start = int(torch.randint(len(self.ids) - LENGTH + 1, (), generator=generator))
        return self.ids[start : start + LENGTH]


class ByteModel(L.LightningModule):
    """Qwen3 with AdamW; the rate warms up, then falls along a cosine with whatever ends first, time or steps."""

    def __init__(self, lr: float, steps: int, timer: Timer, seconds: float) -> None:
        super().__init__()
        self.lm = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
        self.lr, self.steps, self.timer, self.seconds = lr, steps, timer, seconds

    def rate(self, step: int) -> float:
        """Share of the learning rate."""
        share = max(self.timer.time_elapsed() / self.seconds, step / self.steps if self.steps > 0 else 0.0)
        share += 1e-3  # the first step counts too
        return share / WARM_UP if share < WARM_UP else 0.5 + 0.5 * math.cos(math.pi * min(1.0, share))

    def loss(self, ids: Tensor) -> Tensor:
        """Mean negative log-likelihood of tokens 2 to T, nats; ids [B, T]."""
        return self.lm(input_ids=ids, labels=ids, use_cache=False).loss

    def training_step(self, batch: Tensor) -> Tensor:
        """One step."""
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor) -> None:
        """Log the held-out loss."""
        self.log("held_out", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Gains of norms do not decay."""
        groups = [
            {"params": [p for p in self.lm.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in self.lm.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train, write the folder, and say what came out."""
    L.seed_everything(0, verbose=False)
    ids = byte_ids(map(read, options.text))
    cut = int(len(ids) * (1 - HELD_OUT))
    held_out = ids[cut : cut + (len(ids) - cut) // LENGTH * LENGTH].view(-1, LENGTH)
    if not len(held_out):
        sys.exit(f"--text has {len(ids)} bytes; at least {math.ceil(LENGTH / HELD_OUT)} are needed")
    timer = Timer({"minutes": options.minutes})
    model = ByteModel(options.lr, options.steps, timer, 60 * options.minutes)
    settings: dict[str, Any] = {
        **{"accelerator": "cpu", "precision": "bf16-mixed", "gradient_clip_val": 1.0, "callbacks": [timer]},
        **{"max_steps": options.steps, "val_check_interval": 500, "limit_val_batches": 8},
        **{"logger": False, "enable_checkpointing": False, "log_every_n_steps": 100},
    }
    trainer = L.Trainer(**settings)
    after: Any = DataLoader(held_out, batch_size=options.batch)  # type: ignore[arg-type]
    trainer.fit(model, DataLoader(RandomWindows(ids[:cut]), batch_size=options.batch), after)
    steps = trainer.global_step
    measure = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (result,) = measure.validate(model, after, verbose=False)
    write(model.lm, Path(options.out))
    return {
        "steps": steps,
        "tokens": steps * options.batch * LENGTH,
        "parameters": model.lm.num_parameters(),
        "minutes": round(timer.time_elapsed() / 60, 1),
        "held-out loss": round(result["held_out"], 4),
        "bits per byte": round(result["held_out"] / math.log(2), 4),
    }


def write(lm: Qwen3ForCausalLM, folder: Path) -> None:
    """In bf16, as such models are published; the folder has its name when it is whole."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    lm.bfloat16().save_pretrained(partial)
    byte_tokenizer().save_pretrained(partial)
    partial.rename(folder)


def main() -> None:
    """Train and make ids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="UTF-8 files to train on")
    parser.add_argument("--out", default="out/second_model", help="folder of the model")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--steps", type=int, default=-1, help="end after so many, if the time is not over before")
    parser.add_argument("--batch", type=int, default=4, help=f"windows of {LENGTH} bytes in a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ids_out", help="safetensors file for bench/quality.py --ids")
    parser.add_argument("--evaluation_text", help="file the evaluation windows are from")
    parser.add_argument("--calibration_text", help="file or builtin; the first of --text if not given")
    options = parser.parse_args()
    if options.ids_out and not options.evaluation_text:
        parser.error("--ids_out needs --evaluation_text")
    if not Path(options.out).exists():
        print(json.dumps(train(options)), flush=True)
    if options.ids_out:
        calibration = byte_ids([read(options.calibration_text or options.text[0])])
        evaluation = byte_ids([read(options.evaluation_text)])
        ids = {
            "calibration_ids": windows(calibration, CALIBRATION_WINDOWS, "--calibration_text").int(),
            "evaluation_ids": windows(evaluation, EVALUATION_WINDOWS, "--evaluation_text").int(),
        }
        save_file(ids, options.ids_out)


if __name__ == "__main__":
    main()
