"""python -m bvae.train: trains a two-stage VAE, or goes on with an interrupted run.

With no argument it trains the `shapes` preset, a small generated data set, on whatever device there is.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from bvae.api import complete, default_folder, make_trainer
from bvae.config import PRESETS, Config, find_preset
from bvae.config.registry import networks, part_settings
from bvae.config.settings import GROUPS, DataSettings, EvaluationSettings, MachineSettings, Side, configure
from bvae.errors import Interrupted, UserError, run_command
from bvae.files import encode_json, exists
from bvae.machine import prepare_process
from bvae.models.vae import count_parameters, first_stage, second_stage
from bvae.report.write import write_report
from bvae.run.checkpoint import LAST
from bvae.run.data import load_data
from bvae.two_stage import read_config
from bvae.world import Lost, World


def _read_side(words: list[str]) -> Side:
    height, cross, width = words[0].partition("x")
    return (int(height), int(width)) if cross else int(height)


_SIDE = PrimitiveConstructorSpec(
    nargs=1,
    metavar="N|HxW",
    instance_from_str=_read_side,
    is_instance=lambda side: isinstance(side, int | tuple),
    str_from_instance=lambda side: [str(side) if isinstance(side, int) else f"{side[0]}x{side[1]}"],
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Data(DataSettings):
    __doc__ = DataSettings.__doc__
    side: Annotated[Side, _SIDE] = 32
    """Height and width of an image: N, or HxW where it is not square."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Evaluation(EvaluationSettings):
    __doc__ = EvaluationSettings.__doc__
    fid_protocol: Annotated[str, tyro.conf.arg(aliases=["--protocol"])] = "tf1"  # type: ignore[assignment]
    """How images are brought to the network: tf1, pytorch-fid or clean (docs/fid.md)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Machine(MachineSettings):
    __doc__ = MachineSettings.__doc__
    compile: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: the faster)")] = False
    """Let torch.compile make the network's passes: minutes a stage; where it cannot be done the run says why.
    By default a stage of over half an hour (CUDA: three minutes) times both. Results differ by roundings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Train a two-stage VAE whose balance nobody has to tune.

    With no argument: the `shapes` preset, made on the spot, on whatever device there is. Every setting of a preset
    can be overridden; --dry-run prints all of them as they are then.
    """

    preset: str = "shapes"
    """Name of the recipe to start from."""
    out: Path | None = None
    """Folder of the run, which must not exist yet; runs/<preset>-<time> by default."""
    resume: Path | None = None
    """Go on with the run in this folder; --epochs, --epochs2, --max-steps, --device, --data and logging may change."""
    dry_run: bool = False
    """Print the resolved configuration and the parameter counts as JSON, and train nothing."""


CLI_GROUPS = {**GROUPS, "data": _Data, "evaluation": _Evaluation, "machine": _Machine}


def _groups() -> dict[str, type]:
    """The groups of options: those of Config, then a group for each part that has settings of its own."""
    return {**CLI_GROUPS, **{re.sub(r"\W+", "_", name): s for name, s in part_settings().items()}}


def _given(argv: list[str]) -> set[str]:
    """The settings that the command line names."""
    words = [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    return {word.removeprefix("no_") for word in words} | set(words)


def parse(argv: list[str]) -> tuple[Config, RunOptions]:
    """(the configuration, the other options). Defaults come from --preset, or with --resume from that run."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset")
    early.add_argument("--resume", type=Path)
    try:
        chosen, _ = early.parse_known_args(argv)
    except argparse.ArgumentError:
        chosen = argparse.Namespace(preset=None, resume=None)  # tyro names the mistake below
    base = read_config(chosen.resume) if chosen.resume is not None else find_preset(chosen.preset or "shapes")
    if base.network not in networks:
        raise UserError(
            f"{chosen.resume}: its network {base.network!r} was given from Python: go on there, with "
            f"bvae.fit(train, network=..., out={str(chosen.resume)!r}, resume=True)"
        )
    groups = _groups()
    defaults = {**base.to_dict(), "compile": bool(base.compile)}
    fields: list[Any] = []
    for name, group in groups.items():
        own = {f.name: defaults[f.name] for f in dataclasses.fields(group) if f.name in defaults}
        fields.append((name, tyro.conf.OmitArgPrefixes[group], dataclasses.field(default=group(**own))))  # type: ignore[valid-type, misc]
    shown = dataclasses.make_dataclass("Arguments", fields, bases=(RunOptions,), frozen=True, kw_only=True)
    shown.__doc__ = RunOptions.__doc__
    arguments: Any = tyro.cli(
        shown, default=shown(preset=base.preset), args=argv, prog="python -m bvae.train", config=()
    )
    values = {f.name: getattr(getattr(arguments, n), f.name) for n, g in groups.items() for f in dataclasses.fields(g)}
    if "compile" not in _given(argv):
        values["compile"] = base.compile
    config = configure(values, arguments.preset, _given(argv)).validate()
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
        if not r:
            continue
        if "kl" not in r:  # a deterministic family: z is mu
            lines.append(f"stage {number}: test mse {r['mse_mean']:.5f}, variance of a code {r['code_variance']:.3f}")
            continue
        law = f"variance law {r['variance_law']:.3f} (should be 1), " if "variance_law" in r else ""
        lines.append(
            f"stage {number}: test mse {r['mse_sampled']:.5f} (sampled) {r['mse_mean']:.5f} (mean), "
            f"KL {r['kl']:.2f} nats, gamma {r['gamma']:.4f}, {law}"
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


def find_folder(config: Config, options: RunOptions, world: World) -> tuple[Path, bool]:
    """The run's folder, and whether to go on with the run in it: on all ranks what rank 0 finds."""
    begun = world.remembered() if world.first else None
    folder = options.resume or options.out or default_folder(config.preset)
    resume = options.resume is not None
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # safetensors opens no such file
        raise UserError(f"{folder}: its name is not UTF-8: choose another folder") from None
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
        config, options = parse(argv)
        if options.dry_run:
            dry_run(config)
            return 0
    world.connect(config.device)
    folder, resume = find_folder(config, options, world)
    prepare_process()
    trainer = make_trainer(config, load_data(config, quiet=not world.first), folder, world=world, resume=resume)
    if world.first:
        among = f"{world.size} processes, the first on " if world.size > 1 else ""
        count = len(trainer.stages.data.train)
        print(f"{config.preset}: {count} images on {among}{world.device}, into {folder}", flush=True)
    try:
        views = complete(trainer)
    except Interrupted as interrupted:
        if world.first:
            print(f"{interrupted}; go on with: python -m bvae.train --resume {folder}", file=sys.stderr)
        return 128 + interrupted.signal
    except Lost as lost:
        raise Lost(f"{lost}; the run goes on from its last checkpoint with --resume {folder}") from lost
    if world.first:
        print(summary(trainer.results))
        print(f"pictures, results.json and the model: {folder}")
        print(f"everything on one page: {write_report([folder], views=views)}")
    return 0


if __name__ == "__main__":
    run_command(main, "use a smaller --batch, or --amp")
