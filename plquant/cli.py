"""The command line. ``main`` answers ``--help`` at once; Lightning, which takes seconds to import, comes after."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import plquant

COMMANDS = {
    "calibrate": "Quantize a model block by block and write it to a folder.",
    "validate": "Measure perplexity, of the original model or of a quantized one.",
    "plan": "Say what a run will take and give: memory, size, effective bits; loads no weights.",
    "verify": "Check the output folder of a finished run: exit status 0 if all is well, 1 if not.",
    "tune": "Train the scales of a quantized model on its loss as a whole, into a new folder.",
    "generate": "Continue a text with a quantized model, from its packed integers.",
}

HELP = """usage: plquant [-h] [--version] COMMAND ...

Post-training quantization of large language models.

commands:
{commands}

plquant COMMAND --help shows all options of one; to begin with:
  plquant calibrate --model.checkpoint HuggingFaceTB/SmolLM2-135M --output_dir out/smollm2
  plquant validate --model.checkpoint out/smollm2
  plquant calibrate --model.method.help OmniQuant"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        args: Arguments after the program's name; those of the process if not given.
    """
    args = sys.argv[1:] if args is None else list(args)
    if not args or args[0] in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:<11} {text}" for name, text in COMMANDS.items())))
        return
    if args[0] == "--version":
        print(f"plquant {plquant.__version__}")
        return
    if args[0] not in COMMANDS:
        sys.exit(f"plquant: {args[0]!r} is not a command; there are {', '.join(COMMANDS)}. See plquant --help.")
    if args[0] == "verify":
        from plquant.verify import main as verify

        sys.exit(verify(args[1:]))
    if args[0] == "generate":
        from plquant.generate_cli import run as generate

        return generate(args[1:])
    if args[0] == "tune":
        from plquant.tune_cli import run as tune

        return tune(args[1:])
    from plquant.lightning_cli import run

    run(args)
