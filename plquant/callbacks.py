"""Progress bars."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, TQDMProgressBar

from plquant.block_module import BlockModule


class BlockProgress(TQDMProgressBar):
    """One bar per block: block, epoch, loss (1 is rounding to nearest) and the time left for the whole run.

    Args:
        refresh_rate: Steps between two updates; 0 shows no bar.
    """

    def __init__(self, refresh_rate: int = 5) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=False)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Name the bar after the block."""
        super().on_train_epoch_start(trainer)
        module = trainer.lightning_module
        if isinstance(module, BlockModule):
            blocks = "" if module.progress is None else f"/{module.progress.total}"
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self.train_progress_bar.set_description(f"block {module.block.index + 1}{blocks} {epoch}")

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float | dict]:
        """The loss, and the time left."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        if isinstance(pl_module, BlockModule) and pl_module.progress is not None:
            share = trainer.global_step / max(trainer.estimated_stepping_batches, 1)
            left = pl_module.progress.seconds_left(pl_module.block.index, share)
            if left is not None:
                items["run left"] = Tqdm.format_interval(left)
        return items
