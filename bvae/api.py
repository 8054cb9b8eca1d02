"""Training from Python: `fit`, and the path from a configuration to a finished run that bvae.train takes too."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bvae.config import Config, find_preset
from bvae.config.registry import Part, networks, part_settings
from bvae.config.settings import configure
from bvae.data import Dataset
from bvae.engine.interrupts import stopping
from bvae.engine.trainer import Trainer
from bvae.errors import Interrupted, UserError
from bvae.files import exists
from bvae.machine import has_bf16, set_threads
from bvae.models.vae import CUSTOM, Network, first_stage, latents_of
from bvae.report.panels import draw
from bvae.report.views import Views
from bvae.run.data import load_data
from bvae.run.folder import Run
from bvae.run.priors import check_fit, fit_prior_of
from bvae.run.trackers import require
from bvae.seeds import derive
from bvae.stages.build import Stages, check_data
from bvae.two_stage import TwoStageVAE
from bvae.world import World

Data = str | os.PathLike[str] | np.ndarray | Tensor | Dataset
"""images: a path (docs/data.md), `shapes`, an array or tensor uint8 [N,H,W,C], or a Dataset"""


def register_network(name: str, build: Callable[..., tuple[torch.nn.Module, torch.nn.Module]]) -> None:
    """Makes a network available as `--network NAME` and to bvae.load, in this process.

    Args:
        build: build(config) or build() -> (encoder, decoder); see `fit` for what they take and give.
    """
    networks.add(Part(name, build))


def fit(
    train: Data,
    test: Data | None = None,
    *,
    preset: str = "cifar10",
    network: str | Network | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Trains a VAE whose balance nobody has to tune, and returns its run.

    Args:
        train: training images; side and channels follow from them where they are arrays and are not given.
        test: test images; without them one image in ten is held out, or the source's own test set is taken.
        preset: the recipe to start from.
        network: a registered name; or (encoder, decoder), or a function that makes the two. The encoder takes images
            float [B,C,H,W] in [0,1] and gives (mu, log_sigma), each [B,k], or for a deterministic family mu alone; the
            decoder takes z [B,k] and gives logits [B,C,H,W]. The given modules are trained in place.
        out: the run's folder; runs/<preset>-<time> by default. It must not exist yet, unless `resume` is true.
        resume: go on with the run in `out`, from its last checkpoint.
        settings: as on the command line of bvae.train: latents=6, epochs=15, batch=50, kl_weight="auto", ...

    Raises:
        UserError: data, settings or networks that cannot be, before anything is written.
        KeyboardInterrupt: after Ctrl-C, once the state is saved; `resume=True` goes on.
    """
    folder = Path(out) if out is not None else default_folder(preset)
    if isinstance(network, str):
        network, settings = None, {**settings, "network": network}
    config = Run(folder).config if resume else find_preset(preset)
    config = _with_settings(config, settings)
    dataset = _dataset(train, test, config)
    if dataset is not None and not resume:
        side, channels = _shape_of(dataset.train)
        config = _with_settings(config, {"side": side, "channels": channels, **settings})
    elif dataset is None:
        config = dataclasses.replace(config, data=os.fspath(train))  # type: ignore[arg-type]
    if network is not None:
        config, network = _with_network(config, network, settings)
    config = config.validate()
    if config.network not in networks and network is None:
        networks[config.network]  # raises, naming those that exist
    if dataset is None:
        dataset = load_data(config, quiet=quiet)
    trainer = make_trainer(config, dataset, folder, resume=resume, network=network, quiet=quiet)
    try:
        complete(trainer)
    except Interrupted as interrupted:
        raise KeyboardInterrupt(f"{interrupted}; resume=True with out={str(folder)!r} goes on") from interrupted
    run = trainer.run_folder
    run.model = trainer.model.eval()
    return run


def default_folder(preset: str) -> Path:
    return Path("runs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def _with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """The configuration with settings of Config and of parts. Raises UserError naming one that does not exist."""
    fields = {f.name for f in dataclasses.fields(config)} - {"options"}
    own = {f.name for s in part_settings().values() for f in dataclasses.fields(s)}
    unknown = sorted(set(settings) - fields - own)
    if unknown:
        raise UserError(f"there is no setting {unknown[0]!r}; python -m bvae.train --help lists them")
    return configure({**config.to_dict(), **settings}, config.preset, set(settings))


def _dataset(train: Data, test: Data | None, config: Config) -> Dataset | None:
    """The data set of arrays; None if `train` is a path, which is read once the configuration is known."""
    if isinstance(train, Dataset):
        if test is not None:
            raise UserError("test images are given beside a Dataset, which has its own")
        return train
    if isinstance(train, str | os.PathLike):
        if test is not None:
            raise UserError("test images are given beside a path: give arrays for both, or a path that holds both")
        return None
    if isinstance(test, str | os.PathLike | Dataset):
        raise UserError("the training images are an array; the test images must be one too")
    return Dataset.from_arrays(train, test, seed=config.data_seed)


def _shape_of(images: np.ndarray) -> tuple[int | tuple[int, int], int]:
    """(side, channels)"""
    height, width, channels = images.shape[1:]
    return height if height == width else (height, width), channels


def _with_network(config: Config, network: Network, settings: dict[str, Any]) -> tuple[Config, Network]:
    """The configuration of given networks, with their k, and the networks as modules."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "weights"))
        vae = first_stage(config, network)
    k = latents_of(vae, config)
    if settings.get("latents", k) != k:
        raise UserError(f"latents={settings['latents']}, but the network's encoder gives {k}")
    values = {**config.to_dict(), "network": CUSTOM, "latents": k}
    return configure(values, config.preset, set()), (vae.encoder, vae.decoder)


def make_trainer(
    config: Config,
    data: Dataset,
    folder: Path,
    *,
    world: World | None = None,
    resume: bool = False,
    network: Network | None = None,
    quiet: bool = False,
) -> Trainer:
    """The trainer of a validated configuration, before its first step, or with `resume` after the last checkpoint's.

    Args:
        folder: the run's: new, or with `resume` that of the run to go on with.
        world: connected, all ranks make the same calls; this process alone if None.

    Raises UserError for all that can be refused, before anything is written.
    """
    world = world or World().connect(config.device)
    if config.threads is not None:
        set_threads(config.threads)
    data = data.hold_out(config.val, config.data_seed) if config.val else data
    check_data(config, data, world)
    require(config.logger)
    for name in config.prior:
        check_fit(name)
    run = Run(folder, network)
    state = run.load_state() if resume else None
    if state is not None:
        run.check_same(config, data, state[1])
    elif world.first and exists(folder):
        raise UserError(f"{folder}: exists already; choose another --out, or go on with --resume {folder}")
    torch.manual_seed(derive(config.seed, "weights"))
    model = TwoStageVAE(config, network).to(world.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if state is None and model.stage1.prior is not None:
        model.stage1.prior.begin(data.train, derive(config.seed, "pseudo-inputs"))
    amp = config.amp and has_bf16(world.device)
    return Trainer(Stages(config, data, model, amp, world), run, state, world, quiet)


def complete(trainer: Trainer) -> Views | None:
    """Trains to the end and draws the pictures; returns the model's views, on rank 0.

    Raises Interrupted where a signal has asked for the end, and the state is saved.
    """

    def stop(number: int) -> None:
        trainer.stop = number

    with stopping(stop), trainer.log:
        results = trainer.run()
        if not trainer.world.first:
            return None
        folder, data = trainer.run_folder.folder, trainer.stages.data
        for name in trainer.config.prior:
            trainer.log.note(f"prior {name}: {fit_prior_of(folder, trainer.model, data, name, trainer.config.seed)}")
        return draw(folder, trainer.model, data, results, trainer.log, trainer.finished_epochs)
