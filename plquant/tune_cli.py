"""``plquant tune``: train the scales of a finished checkpoint on its loss as a whole."""

from __future__ import annotations

import os
import sys

import lightning as L
from jsonargparse import ArgumentParser

from plquant.data import TextData
from plquant.lightning_cli import chosen_classes
from plquant.quiet import quiet
from plquant.tuning import said, tune

TRAINER = {
    "max_epochs": 4,
    "precision": "bf16-mixed",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def _parser(args: list[str]) -> ArgumentParser:
    parser = ArgumentParser(prog="plquant tune", description="Train the scales of a quantized model end to end.")
    parser.add_argument("-c", "--config", action="config", help="YAML file with options")
    parser.add_function_arguments(tune, skip={"data", "trainer"}, as_positional=True)
    parser.add_subclass_arguments(TextData, "data", required=False)
    parser.add_argument("--seed", type=int, default=0, help="decides the order of the windows")
    parser.add_class_arguments(L.Trainer, "trainer")
    parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER.items()})
    if "data" not in chosen_classes(args):  # to another class its options would be handed on
        # Not the windows that a run is calibrated on by default: it fits those too well.
        parser.set_defaults({"data": {"class_path": "BuiltinText", "init_args": {"seed": 1}}})
    return parser


def run(args: list[str]) -> None:
    """Parse and run; errors a user can mend end in a message, not in a traceback."""
    parser = _parser(args)
    config = parser.parse_args(args)
    try:
        L.seed_everything(config.pop("seed"), verbose=False)
        config.pop("config", None)
        with quiet():
            options = vars(parser.instantiate_classes(config))
            done = tune(**options)
    except (ValueError, OSError, NotImplementedError) as error:
        if os.environ.get("PLQUANT_DEBUG"):
            raise
        sys.exit(f"plquant: error: {error}")
    except KeyboardInterrupt:
        sys.exit("plquant: interrupted; nothing was written")
    print(said(done))
    print(f"written to {options['output_dir']}")
