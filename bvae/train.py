"""python -m bvae.train: trains a two-stage VAE, or goes on with an interrupted run.

With no argument it trains the `shapes` preset, a small generated data set, on whatever device there is.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from bvae.config import PRESETS, Config, find_preset
from bvae.engine.trainer import Interrupted, Trainer
from bvae.errors import UserError, run_command
from bvae.files import encode_json, exists
from bvae.machine import prepare_process
from bvae.models.vae import count_parameters, first_stage, second_stage
from bvae.report.write import write_report
from bvae.run.checkpoint import LAST
from bvae.run.data import load_data
from bvae.two_stage import read_config
from bvae.world import Lost, World


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Config):
    """Train a two-stage VAE whose balance nobody has to tune.

    With no argument: the `shapes` preset, made on the spot, on whatever device there is. Every setting of a preset
    can be overridden; what they are after that is printed by --dry-run.
    """

    out: Path | None = None
    """Folder of the run, which must not exist yet; runs/<preset>-<time> by default."""
    resume: Path | None = None
    """Go on with the run in this folder; --epochs, --epochs2, --max-steps, --device, --data and logging may change."""
    compile: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: the faster)")] = False
    """Let torch.compile make the network's passes: minutes a stage; where it cannot be done the run says why.
    By default a stage of over half an hour (CUDA: three minutes) times both. Results differ by roundings."""
    dry_run: bool = False
    """Print the resolved configuration and the parameter counts as JSON, and train nothing."""


def parse(argv: list[str]) -> tuple[Config, Arguments]:
    """(the configuration, all arguments). Defaults come from --preset, or with --resume from that run."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset")
    early.add_argument("--resume", type=Path)
    early.add_argument("--compile", action=argparse.BooleanOptionalAction)
    try:
        chosen, _ = early.parse_known_args(argv)
    except argparse.ArgumentError:
        # tyro names the mistake below
        chosen = argparse.Namespace(preset=None, resume=None, compile=None)
    base = read_config(chosen.resume) if chosen.resume is not None else find_preset(chosen.preset or "shapes")
    arguments = tyro.cli(
        Arguments,
        default=Arguments(**{**base.to_dict(), "compile": bool(base.compile)}),
        args=argv,
        prog="python -m bvae.train",
        config=(tyro.conf.AvoidSubcommands,),
    )
    names = [f.name for f in dataclasses.fields(Config)]
    values = {name: getattr(arguments, name) for name in names}
    values["compile"] = base.compile if chosen.compile is None else chosen.compile
    config = Config(**values).validate()
    if arguments.resume is not None and arguments.out is not None:
        raise UserError("--out and --resume contradict each other: a resumed run stays in its folder")
    if config.preset not in PRESETS:
        raise UserError(f"--preset {config.preset}: there is no such preset; choose from {', '.join(PRESETS)}")
    return config, arguments


def dry_run(config: Config) -> None:
    counts = {"stage1": count_parameters(first_stage(config)), "stage2": 0}
    if config.epochs2:
        counts["stage2"] = count_parameters(second_stage(config))
    resolved: dict[str, Any] = {**config.to_dict(), "kl_weight": config.resolved_kl_weight(), "parameters": counts}
    print(encode_json(resolved, indent=2))


def summary(results: dict[str, Any]) -> str:
    """The final figures as a few lines to read."""
    lines = []
    for number in (1, 2):
        r = results.get(f"stage{number}")
        if r:
            lines.append(
                f"stage {number}: test mse {r['mse_sampled']:.5f} (sampled) {r['mse_mean']:.5f} (mean), "
                f"KL {r['kl']:.2f} nats, gamma {r['gamma']:.4f}, variance law {r['variance_law']:.3f} (should be 1), "
                f"{r['active']} active and {r['inactive']} inactive latents"
            )
    if "factors" in results:
        f = results["factors"]
        lines.append(f"truth: {f['true']} factors ({', '.join(f['names'])}); {f['active']} latents are active")
        best = [max(range(len(f["correlation"])), key=lambda j: f["correlation"][j][i]) for i in range(f["true"])]
        pairs = [
            f"{name} {f['correlation'][j][i]:.2f} (z{j})"
            for i, (name, j) in enumerate(zip(f["names"], best, strict=True))
        ]
        lines.append("       largest correlation with a latent: " + ", ".join(pairs))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    with World.join() as world:
        return train(sys.argv[1:] if argv is None else argv, world)


def find_folder(config: Config, arguments: Arguments, world: World) -> tuple[Path, bool]:
    """The run's folder, and whether to go on with the run in it: on all ranks what rank 0 finds."""
    begun = world.remembered() if world.first else None
    folder = arguments.resume or arguments.out or Path("runs") / f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    resume = arguments.resume is not None
    if begun is not None:  # torchrun has restarted what this job began, by the same command line
        folder = Path(begun)
        resume = exists(folder / LAST)
    elif resume and not exists(folder / LAST):
        raise UserError(f"{folder}: has no checkpoint to resume from ({LAST})")
    elif not resume and world.first and exists(folder):
        raise UserError(f"{folder}: exists already; choose another --out, or go on with --resume {folder}")
    if world.first:
        world.remember(str(folder))
    return Path(world.from_first(str(folder))), world.from_first("resume" if resume else "new") == "resume"


def train(argv: list[str], world: World) -> int:
    with contextlib.ExitStack() as stack:
        if not world.first:  # usage and mistakes in it are the same on all ranks
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        config, arguments = parse(argv)
        if arguments.dry_run:
            dry_run(config)
            return 0
    world.connect(config.device)
    folder, resume = find_folder(config, arguments, world)
    prepare_process()
    trainer = Trainer(config, load_data(config, quiet=not world.first), folder, resume, world=world)
    if world.first:
        among = f"{world.size} processes, the first on " if world.size > 1 else ""
        print(
            f"{config.preset}: {len(trainer.data.train)} images on {among}{trainer.device}, into {folder}", flush=True
        )

    def stop(number: int, _: Any) -> None:
        trainer.stop = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        results = trainer.run()
    except Interrupted as interrupted:
        if world.first:
            print(f"{interrupted}; go on with: python -m bvae.train --resume {folder}", file=sys.stderr)
        return 128 + interrupted.signal
    except Lost as lost:
        raise Lost(f"{lost}; the run goes on from its last checkpoint with --resume {folder}") from lost
    if world.first:
        print(summary(results))
        print(f"pictures, results.json and the model: {folder}")
        print(f"everything on one page: {write_report([folder], views=trainer.views)}")
    return 0


if __name__ == "__main__":
    run_command(main)
