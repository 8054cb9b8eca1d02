"""The command line `bvae COMMAND ...`, also `python -m bvae`: the commands of the package under one name."""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import cast

from bvae.errors import run_command

# name: (module with a main(argv), description). A module is imported when its command is called: `--help` stays fast.
COMMANDS = {
    "train": ("bvae.train", "train a two-stage VAE, or go on with an interrupted run"),
    "prep": ("bvae.data.prep", "turn a folder or an archive of images into a prepared store"),
    "fid": ("bvae.fid", "measure the Frechet Inception distance between two sets of images"),
    "sample": ("bvae.sample", "draw images from a trained model"),
    "evaluate": ("bvae.evaluate", "measure a trained model on a test set"),
    "prior": ("bvae.prior", "fit other priors to the latents of a trained model"),
    "study": ("bvae.study", "train and compare runs over several settings or seeds"),
    "report": ("bvae.report.__main__", "write one page on a run, or on several side by side"),
    "export": ("bvae.export", "write encoder and decoder for ONNX Runtime or torch.export"),
    "info": ("bvae.info", "tell the build, the devices and the versions"),
}

USAGE = "usage: bvae [-h] [--version] COMMAND ..."


def help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {description}" for name, (_, description) in COMMANDS.items()]
    about = "Variational autoencoders whose reconstruction/KL balance nobody has to tune."
    return "\n".join([USAGE, "", about, "", "commands:", *lines, "", "bvae COMMAND --help tells a command's options."])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (by default the process's arguments) names; returns its exit code.

    Raises UserError, as the commands do.
    """
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        from bvae import __version__

        print(f"bvae {__version__}")
        return 0
    if name not in COMMANDS:
        problem = f"there is no command {name!r}" if name else "a command is missing"
        print(f"{USAGE}\nbvae: error: {problem} (choose from {', '.join(COMMANDS)})", file=sys.stderr)
        return 2
    command = cast(Callable[[list[str]], int | None], importlib.import_module(COMMANDS[name][0]).main)
    return command(rest) or 0


def console() -> None:
    """The console script: an interruption ends in one line even while a command's modules are being imported."""
    run_command(main)


if __name__ == "__main__":
    console()
