"""LightningCLI with our commands: every option is an argument of a class or method, its help the docstring."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import plquant.methods  # noqa: F401  registers the methods' short names
import plquant.parts  # noqa: F401  and those of their parts
import plquant.sign_sgd  # noqa: F401  and of an optimizer
from plquant.data import TextData
from plquant.distributed import is_rank_zero
from plquant.model import QuantizedLM
from plquant.trainer import BlockwiseTrainer

DEFAULTS = {"model.method": "OmniQuant", "data": "BuiltinText"}


def chosen_classes(args: Sequence[str]) -> set[str]:
    """Which of the keys of ``DEFAULTS`` get a class on the command line or in one of its configuration files."""
    flags = dict(pair.partition("=")[::2] for pair in args if pair.startswith("--"))
    chosen = {key for key in DEFAULTS if f"--{key}" in flags}
    following = {flag: value for flag, value in zip(args, args[1:], strict=False) if flag in ("-c", "--config")}
    for path in (*following.values(), *(value for flag, value in flags.items() if flag == "--config" and value)):
        if Path(path).is_file():
            config = yaml.safe_load(Path(path).read_text())
            for key in DEFAULTS:
                section: Any = config
                for name in key.split("."):
                    section = section.get(name) if isinstance(section, dict) else None
                if isinstance(section, str) or (isinstance(section, dict) and "class_path" in section):
                    chosen.add(key)
    return chosen


def with_class_names(args: Sequence[str]) -> list[str]:
    """The arguments with methods named as their classes are: ``--model.method best`` is ``Best``."""
    names = {name.lower(): name for name, value in vars(plquant.methods).items() if isinstance(value, type)}
    known, following = list(args), False
    for index, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if following:
            known[index] = names.get(arg.lower(), arg)
        elif flag == "--model.method" and equals:
            known[index] = f"{flag}={names.get(value.lower(), value)}"
        following = arg in ("--model.method", "--model.method.help")
    return known


class PlquantCLI(LightningCLI):
    """``model`` is what is quantized and how, ``data`` the text, ``trainer`` how each block is fitted."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Methods of the trainer, and those of their arguments that are made from sections of the configuration."""
        return {name: {"model", "datamodule"} for name in ("calibrate", "validate", "plan")}

    arguments: Sequence[str] = ()  # what is being parsed

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults that work for a newcomer, on a machine without a network too.

        Only for what is not chosen: to another class jsonargparse hands on the default one's options, learning rates
        and numbers of samples, in the place of that class's own.
        """
        chosen = chosen_classes(self.arguments)
        parser.set_defaults({key: {"class_path": name} for key, name in DEFAULTS.items() if key not in chosen})

    def before_calibrate(self) -> None:
        """Hand the run's configuration over, to be kept beside its result."""
        assert isinstance(self.trainer, BlockwiseTrainer)
        self.trainer.run_config = self._parser("calibrate").dump(self.config["calibrate"], skip_none=False)


def run(args: list[str]) -> None:
    """Parse and run; errors a user can mend end in a message, not in a traceback."""
    own = args == sys.argv[1:]  # Lightning warns of arguments that are not
    args = with_class_names(args)
    if own:
        sys.argv[1:] = args
    PlquantCLI.arguments = args
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
            args=None if own else args,
        )
    except (ValueError, OSError, NotImplementedError) as error:
        if os.environ.get("PLQUANT_DEBUG"):
            raise
        # What all processes refuse is said by one, what became of another by each.
        said_here = is_rank_zero() or isinstance(error, ChildProcessError)
        sys.exit(f"plquant: error: {error}" if said_here else 1)
    except KeyboardInterrupt:
        sys.exit("plquant: interrupted; `calibrate` goes on with the first unfinished block when run again")
