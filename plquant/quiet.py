"""A Trainer of Lightning among many: without its banner and hints, and Ctrl-C as everywhere else."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.callbacks import ProgressBar

# Lightning's advice for training, which does not apply: a block is in evaluation mode and has no validation of its own.
HINTS = (
    ".*does not have many workers.*",
    ".*in eval mode at the start.*",
    ".*have no `val_dataloader`.*",
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # of figures that are the same in every process
    ".*isinstance.treespec, LeafSpec.*",
    ".*was called before the ``update`` method.*",  # of an expert that no token was sent to
)


def without_bar(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of a Trainer's arguments those with which it shows no progress bar."""
    callbacks = [callback for callback in arguments["callbacks"] if not isinstance(callback, ProgressBar)]
    return {"enable_progress_bar": False, "callbacks": callbacks}


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt, also where Lightning makes an exit of it and turns further ones off."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the banner and the hints that Lightning prints for every Trainer."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for hint in HINTS:
            warnings.filterwarnings("ignore", message=hint)
        try:
            yield
        finally:
            logger.setLevel(level)
