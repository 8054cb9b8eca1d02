"""A run's folder, read and written by one class: configuration, records, results, checkpoints, model, data.

config.json             the configuration, the data's digest, versions, device
metrics.jsonl           a line an epoch, every stage
results.json            the final figures; bvae.evaluate adds FIDs
checkpoints/            the last state of training, and the best weights of the stage trained last
model.safetensors       the final model
priors/                 priors fitted after training
tensorboard/, *.png, report.html
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bvae.config import Config
from bvae.data import Dataset
from bvae.errors import UserError
from bvae.files import encode_json, exists, write_atomically, writing
from bvae.machine import versions
from bvae.metrics.fid_scores import read_fid
from bvae.models.vae import Network
from bvae.run.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint, under
from bvae.run.data import load_data
from bvae.run.log import METRICS, read_metrics
from bvae.two_stage import CONFIG, WEIGHTS, TwoStageVAE, read_run

RESULTS = "results.json"

Which = Literal["last", "best"]


class Run:
    """One run's folder, finished or not, or a folder that save_pretrained wrote.

    Reading raises UserError, naming the file, for what is missing, damaged or not of a run.

    Args:
        folder: need not exist yet.
        network: the first stage's networks, where the configuration's name for them is not registered.
    """

    def __init__(self, folder: str | Path, network: Network | None = None) -> None:
        self.folder = Path(folder)
        self.network = network

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    # ---- reading ------------------------------------------------------------------------------------------------

    @cached_property
    def info(self) -> dict[str, Any]:
        """config.json: {"config": ..., and for a run "data": ..., "versions": ..., "device": ...}."""
        return read_run(self.folder)

    @cached_property
    def config(self) -> Config:
        return Config.from_dict(self.info["config"], self.folder / CONFIG)

    @property
    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl: one dict an epoch, in order; none where no epoch is over."""
        return read_metrics(self.folder) if exists(self.folder / METRICS) else []

    @property
    def results(self) -> dict[str, Any]:
        """results.json; empty where there is none yet."""
        path = self.folder / RESULTS
        if not exists(path):
            return {}
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({error})") from error
        if not isinstance(values, dict) or not all(isinstance(values.get(f"stage{n}", {}), dict) for n in (1, 2)):
            raise UserError(f"{path} does not hold the figures of a run")
        return values

    @property
    def finished(self) -> bool:
        return exists(self.folder / WEIGHTS)  # written last

    @cached_property
    def model(self) -> TwoStageVAE:
        """The model with its last weights, on the CPU."""
        return self.load_model()

    def load_model(self, checkpoint: Which = "last", device: Any = "cpu") -> TwoStageVAE:
        """The model with its last weights, or with the best ones of the stage that was trained last."""
        path = self.folder / {"last": LAST, "best": BEST}[checkpoint]
        model = TwoStageVAE(self.config, self.network)
        if checkpoint == "last" and not exists(path):
            model.load_weights(self.folder)
        else:
            model.load_tensors(under(load_checkpoint(path)[0], "model"), path)
        return model.to(device).eval()

    def load_data(self, source: str | None = None, quiet: bool = False) -> Dataset:
        """The images it was trained on, or those of `source` read by the same settings."""
        return load_data(self.config, source, quiet=quiet)

    def sample(self, n: int, stage: int | None = None, seed: int = 0) -> Tensor:
        """n images [n,C,H,W] in [0,1], from the second stage (GEN-2) where there is one, else from the first."""
        return self.model.sample(n, stage or (2 if self.model.stage2 is not None else 1), seed)

    def sample_prior(self, name: str, n: int, seed: int = 0) -> Tensor:
        """n images [n,C,H,W] in [0,1] from a prior of the run: one that was fitted, `normal` or `second-stage`."""
        from bvae.run.priors import sample_latents  # it reads runs itself

        return self.model.decode(sample_latents(self.folder, self.model, name, n, seed))

    def report(self, out: str | Path | None = None) -> Path:
        """Writes the page on this run, by default report.html in its folder; returns where."""
        from bvae.report.write import write_report  # it takes a second to import, and reads runs itself

        return write_report([self], None if out is None else Path(out))

    # ---- going on -----------------------------------------------------------------------------------------------

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, description) of the last checkpoint."""
        return load_checkpoint(self.folder / LAST)

    def load_best(self) -> dict[str, Tensor]:
        """The best weights, where training has found any."""
        path = self.folder / BEST
        return under(load_checkpoint(path)[0], "model") if exists(path) else {}

    def check_same(self, config: Config, data: Dataset, description: Mapping[str, Any]) -> None:
        """Raises UserError where a configuration or data cannot go on with the run of a checkpoint's description."""
        saved = Config.from_dict(description["config"], self.folder / LAST)
        changed = config.changed_definition(saved)
        if changed:
            name = changed[0]
            values = [getattr(c, name) if hasattr(c, name) else c.option(name) for c in (config, saved)]
            raise UserError(
                f"{self.folder}: cannot resume with --{name.replace('_', '-')} {values[0]}: the run "
                f"has {values[1]}, and that defines it; start a new run"
            )
        if description["stage"] == 2 and config.epochs != saved.epochs:
            raise UserError(f"{self.folder}: cannot resume with --epochs {config.epochs}: stage 1 has ended")
        if description["data_digest"] != data.digest:
            raise UserError(
                f"{self.folder}: cannot resume: {data.name} is not the data the run was trained on "
                f"({data.digest[:23]}... instead of {description['data_digest'][:23]}...)"
            )

    # ---- writing ------------------------------------------------------------------------------------------------

    def begin(self, write: Callable[["Run"], None]) -> None:
        """Makes the folder and lets `write` fill it: under another name, then renamed, so that it appears whole."""
        hidden = Run(self.folder.with_name(f".{self.folder.name}.{os.getpid()}"))
        try:
            with writing(self.folder):
                (hidden.folder / "checkpoints").mkdir(parents=True)
            write(hidden)
            with writing(self.folder):
                hidden.folder.rename(self.folder)
        except BaseException:
            shutil.rmtree(hidden.folder, ignore_errors=True)
            raise

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_config(self, config: Config, data: Dataset, device: str) -> None:
        values = {
            "model": "bvae",
            "config": config.to_dict(),
            "data": {
                "name": data.name,
                "path": config.data,
                "digest": data.digest,
                "train": len(data.train),
                "test": len(data.test),
            },
            "versions": versions(),
            "device": device,
        }
        write_atomically(self.folder / CONFIG, encode_json(values, indent=2).encode())
        for name in ("info", "config"):
            self.__dict__.pop(name, None)

    def save_state(self, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
        save_checkpoint(self.folder / LAST, tensors, description)

    def save_best(self, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
        save_checkpoint(self.folder / BEST, tensors, description)

    def write_results(self, results: Mapping[str, Any], same_model: bool) -> None:
        """results.json; the scores that bvae.evaluate has added stay where the model is the same as then."""
        scores = read_fid(self.folder / RESULTS) if same_model else {}
        write_atomically(self.folder / RESULTS, encode_json({**results, **scores}, indent=2).encode())


def load(
    run: str | Path, checkpoint: Which = "last", device: Any = "cpu", network: Network | None = None
) -> TwoStageVAE:
    """The model of a run's folder, finished or not, or of one that save_pretrained wrote.

    Args:
        checkpoint: the last weights, or the best ones of the stage that was trained last.
        network: (encoder, decoder), or a function that makes them, for a run whose network is not registered.

    Raises:
        UserError: naming the file that is missing, damaged or does not fit.
    """
    return Run(run, network).load_model(checkpoint, device)
