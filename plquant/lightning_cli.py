"""LightningCLI with our commands: every option is an argument of a class or method, its help the docstring."""

from __future__ import annotations

import os
import sys

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import plquant.methods  # noqa: F401  registers the methods' short names
from plquant.data import TextData
from plquant.model import QuantizedLM
from plquant.trainer import BlockwiseTrainer


class PlquantCLI(LightningCLI):
    """``model`` is what is quantized and how, ``data`` the text, ``trainer`` how each block is fitted."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Methods of the trainer, and those of their arguments that are made from sections of the configuration."""
        return {"calibrate": {"model", "datamodule"}, "validate": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults that work for a newcomer, on a machine without a network too."""
        parser.set_defaults({"model.method": {"class_path": "OmniQuant"}, "data": {"class_path": "BuiltinText"}})

    def before_calibrate(self) -> None:
        """Hand the run's configuration over, to be kept beside its result."""
        assert isinstance(self.trainer, BlockwiseTrainer)
        self.trainer.run_config = self._parser("calibrate").dump(self.config["calibrate"], skip_none=False)


def run(args: list[str]) -> None:
    """Parse and run; errors a user can mend end in a message, not in a traceback."""
    try:
        PlquantCLI(
            QuantizedLM,
            TextData,
            subclass_mode_data=True,
            trainer_class=BlockwiseTrainer,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=None,
            parser_kwargs={"prog": "plquant"},
            args=None if args == sys.argv[1:] else args,
        )
    except (ValueError, OSError) as error:
        if os.environ.get("PLQUANT_DEBUG"):
            raise
        sys.exit(f"plquant: error: {error}")
    except KeyboardInterrupt:
        sys.exit("plquant: interrupted; `calibrate` goes on with the first unfinished block when run again")
