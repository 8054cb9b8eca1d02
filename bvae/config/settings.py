"""The settings that define a run, in the groups that `--help` shows, and the rules they obey."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from typeguard import TypeCheckError, check_type

from bvae.config.registry import KINDS, part_settings
from bvae.errors import UserError
from bvae.reference import auto_kl_weight

L2Group = Literal["encoder.downsample", "encoder.scales", "decoder.upsample", "decoder.scales"]
Side = int | tuple[int, int]
T = TypeVar("T")

MOST = {
    "base": 4096,
    "blocks": 1000,
    "latents": 65_536,
    "fc": 65_536,
    "hidden": 65_536,
    "batch": 1_000_000,
    "shapes_train": 10_000_000,
    "shapes_test": 10_000_000,
    "val": 10_000_000,
}
MAX_SIDE = 4096

# Settings that define a run and came after the first runs, which did what the defaults say.
ADDED_LATER = {"crop", "sync_bn", "network", "val", "family", "plateau"}


def _free(**kwargs: Any) -> Any:
    """A field that may change when a run is resumed; every other field defines the run."""
    return field(metadata={"free": True}, **kwargs)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The images, and how they are brought to size."""

    data: str | None = _free(default=None)
    """Images: a folder, .zip or .tar, .npy/.npz, a prepared store, official files; `shapes` is made on the spot."""
    side: Side = 32
    """Height and width of an image: N, or HxW where it is not square."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    crop: int | Literal["square", "none"] = "square"
    """Part of an encoded image that is kept: side of the centred square, `square` (the largest) or `none` (all)."""
    partition: str | None = _free(default=None)
    """Which image is for what: a list `name 0`, 1 (val) or 2 (test); `folders`, by their names; `none`, all one set."""
    split: str | None = _free(default=None)
    """Fractions of train, val and test of encoded images instead, as 0.8,0.1,0.1, at random by --data-seed."""
    jpeg_roundtrip: bool = False
    """Pass every image through JPEG (quality 75, 4:2:0) first, as both reference implementations do for CIFAR-10."""
    data_seed: int = 0
    """Fixes the generated `shapes`, and which images are held out where a source has no test split."""
    val: int = 0
    """Hold N training images out: the best weights are chosen by them; without them by the test images."""
    hflip: bool = False
    """Mirror each training image with probability 1/2."""
    shapes_train: int = 20_000
    """Number of training images of the generated `shapes` set."""
    shapes_test: int = 2_000
    """Number of test images of the generated `shapes` set."""
    stream: Literal["auto", "always", "never"] = _free(default="auto")
    """Read images from their file while training; auto does where a .npy file or prepared store is too large for the
    device's memory. The batches do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The networks of both stages. `scales`, `blocks`, `base`, `fc` belong to `--network resnet`."""

    network: str = "resnet"
    """Encoder and decoder of stage 1, by name."""
    scales: int = 3
    """Resolutions of the encoder; each further one halves the side and doubles the channels."""
    blocks: int = 1
    """Residual blocks per scale."""
    base: int = 32
    """Channels at full resolution."""
    latents: int = 64
    """k, the number of latent variables of either stage."""
    fc: int = 512
    """Width of the encoder's dense block."""
    hidden: int = 2048
    """Width of the second stage's layers."""
    bn: Literal["recompute", "ema"] = "recompute"
    """At stage 1's end, recompute batch-norm statistics under the final weights, or keep the moving averages."""
    bn_batches: int = 300
    """Training batches used to recompute them."""
    sync_bn: bool = False
    """With several processes: normalise over the whole batch, not over each process's part of it."""


@dataclass(frozen=True, kw_only=True)
class BalanceSettings:
    """Family of models of stage 1, and balance of reconstruction and KL divergence."""

    family: str = "vae"
    """vae; without noise on the codes ae, rae-l2, rae-gp, rae-sn, wae-mmd; with another KL info-vae, vamp
    (docs/families.md)."""
    balance: str = "computed"
    """gamma computed from the running mse (the paper), learned (Dai & Wipf 2019), fixed, or another rule by name."""
    gamma: float | None = None
    """With --balance fixed: the decoder's standard deviation."""
    beta: float | None = None
    """With --balance fixed: the weight of the KL against sse/2, that is gamma^2."""
    kl_weight: float | Literal["auto"] = 1.0
    """Weight of the KL in stage 1; `auto` is (2*side/k)^2."""
    l2: float = 0.0
    """l2 * sum(w^2) over the kernels of `l2_on` is added to stage 1's loss."""
    l2_on: tuple[L2Group, ...] = ()
    """Convolution kernels that l2 acts on."""
    prior: tuple[str, ...] = _free(default=())
    """Priors to fit to stage 1's codes at the end, for `bvae.sample --prior` (docs/priors.md)."""
    rescale: bool = False
    """Rescale generated latents where the second stage loses variance (the paper's last step on CelebA)."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Length and learning rate of the training."""

    batch: int = 100
    """Images per step; the last partial batch of an epoch is dropped."""
    epochs: int = _free(default=700)
    """Epochs of stage 1."""
    lr: float = 1e-4
    """Adam's learning rate in stage 1."""
    lr_halve: int = 200
    """Halve stage 1's learning rate every N epochs."""
    plateau: int = 0
    """Also halve it where the score of the held-out images has not improved for N epochs; needs --val (0: never)."""
    epochs2: int = _free(default=1400)
    """Epochs of stage 2; 0 trains stage 1 only."""
    lr2: float = 1e-4
    """Adam's learning rate in stage 2."""
    lr_halve2: int = 100
    """Halve stage 2's learning rate every N epochs."""
    max_steps: int | None = _free(default=None)
    """Cap on the steps of each stage."""
    seed: int = 0
    """Fixes initial weights, shuffling and noise."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Measuring and logging while training."""

    eval_every: int = _free(default=1)
    """Measure the test loss every N epochs (0: only at the end)."""
    eval_images: int = _free(default=2_000)
    """Test images used for that; the final evaluation uses them all."""
    log_every: int = _free(default=100)
    """Read training figures from the device every N steps."""
    checkpoint_seconds: float = _free(default=60.0)
    """Seconds between two checkpoints."""
    fid_every: int = _free(default=0)
    """Measure the FIDs of reconstructions and samples every N epochs (0: never), outside the timed steps."""
    fid_num: int = _free(default=10_000)
    """Images generated for that, and the most test images used as the reference."""
    fid_protocol: Literal["tf1", "pytorch-fid", "clean"] = _free(default="tf1")
    """How images are brought to the network (docs/fid.md); also spelled --protocol."""
    inception: str | None = _free(default=None)
    """Weights of the network, or `download`; by default $BVAE_INCEPTION or torch's hub cache."""
    allow_few: bool = _free(default=False)
    """Measure FIDs of fewer than 2,048 images too."""
    logger: Literal["none", "wandb", "mlflow"] = _free(default="none")
    """Also log to Weights & Biases or MLflow (extras bvae[wandb], bvae[mlflow]); TensorBoard is always written."""


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """Device and speed."""

    amp: bool = False
    """Train in bf16 where the device has units for it; everything is fp32 where not, and without this."""
    device: Literal["auto", "cpu", "cuda"] = _free(default="auto")
    """Where to train; auto takes CUDA when there is one."""
    threads: int | None = _free(default=None)
    """Threads of torch on the CPU; by default one a core. Results differ by roundings."""
    graph: bool = _free(default=True)
    """On CUDA, replay whole steps from a CUDA graph; the numbers do not depend on it."""
    compile: bool | None = _free(default=None)
    """Let torch.compile make the network's passes: minutes at the start of a stage, then fused operations. Left open,
    a long stage tries both and takes the faster; results differ by roundings."""


GROUPS: dict[str, type] = {
    "data": DataSettings,
    "network": NetworkSettings,
    "balance": BalanceSettings,
    "schedule": ScheduleSettings,
    "evaluation": EvaluationSettings,
    "machine": MachineSettings,
}
"""the groups of Config's settings, by the name that --help gives them"""


@dataclass(frozen=True, kw_only=True)
class Config(
    MachineSettings, EvaluationSettings, ScheduleSettings, BalanceSettings, NetworkSettings, DataSettings
):  # fmt: skip
    """A run's configuration. Defaults are the paper's CIFAR-10 recipe (Asperti & Trentin 2020, section IV-A)."""

    preset: str = "cifar10"
    """Name of the recipe these settings started from."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the parts that this run uses, where they are not the parts' defaults (see bvae.config.registry)."""

    @property
    def height(self) -> int:
        return self.side if isinstance(self.side, int) else self.side[0]

    @property
    def width(self) -> int:
        return self.side if isinstance(self.side, int) else self.side[1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.channels, self.height, self.width

    def part(self, settings: type[T]) -> T:
        """The settings of a part, of its own dataclass."""
        names = [f.name for f in dataclasses.fields(settings)]  # type: ignore[arg-type]
        return settings(**{name: self.options[name] for name in names if name in self.options})

    def resolved_kl_weight(self) -> float:
        """`auto` keeps the balance found at 32x32 with 64 latents: (2*side/k)^2."""
        return auto_kl_weight(self.height, self.latents) if self.kl_weight == "auto" else float(self.kl_weight)

    def resolved_gamma(self) -> float | None:
        return math.sqrt(self.beta) if self.beta is not None else self.gamma

    def validate(self) -> Config:
        """Returns itself, or raises UserError naming the first setting that cannot be."""
        self._check_numbers()
        self._check_together()
        for kind, registry in KINDS.items():
            name = getattr(self, kind)
            if kind != "network" or name in registry:  # a network may be given as modules
                registry[name].check(self)
        return self

    def _check_numbers(self) -> None:
        for name in ("scales", "blocks", "base", "latents", "fc", "hidden", "batch", "lr_halve", "lr_halve2"):
            need(getattr(self, name) >= 1, f"--{flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("shapes_train", "shapes_test", "bn_batches", "epochs", "log_every", "eval_images"):
            need(getattr(self, name) >= 1, f"--{flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("epochs2", "eval_every", "fid_every", "val", "plateau"):
            need(getattr(self, name) >= 0, f"--{flag(name)} must not be negative")
        for name, most in MOST.items():  # sizes beyond any machine are refused before they are tried
            need(getattr(self, name) <= most, f"--{flag(name)} must be at most {most}, not {getattr(self, name)}")
        for name in ("lr", "lr2"):
            value = getattr(self, name)
            need(0 < value < math.inf, f"--{flag(name)} must be a positive number, not {value}")
        need(0 <= self.l2 < math.inf, f"--l2 must be a number of at least 0, not {self.l2}")
        for side in (self.height, self.width):
            need(1 <= side <= MAX_SIDE, f"--side must be from 1 to {MAX_SIDE}, not {side}")
        need(self.channels in (1, 3), f"--channels must be 1 or 3, not {self.channels}")
        need(isinstance(self.crop, str) or self.crop >= 1, f"--crop must be at least 1, not {self.crop}")
        need(self.max_steps is None or self.max_steps >= 1, f"--max-steps must be at least 1, not {self.max_steps}")
        need(self.fid_num >= 2, f"--fid-num must be at least 2, not {self.fid_num}")
        need(0 <= self.checkpoint_seconds < math.inf, "--checkpoint-seconds must be a number of at least 0")
        for name in ("seed", "data_seed"):
            need(0 <= getattr(self, name) < 2**63, f"--{flag(name)} must be between 0 and 2^63-1")

    def _check_together(self) -> None:
        need(
            bool(self.l2) == bool(self.l2_on), "--l2 and --l2-on go together: name a weight and the kernels it acts on"
        )
        need(bool(self.epochs2) or not self.rescale, "--rescale needs a second stage: it contradicts --epochs2 0")
        if self.plateau:
            need(bool(self.val), "--plateau goes by the held-out images of --val: name their number")
            need(bool(self.eval_every), "--plateau goes by the scores of epochs: it contradicts --eval-every 0")
        need(len(set(self.l2_on)) == len(self.l2_on), "--l2-on names the same kernels twice")
        if self.kl_weight == "auto":
            need(self.height == self.width, "--kl-weight auto is defined for square images only: give a number")
        else:
            weight = float(self.kl_weight)
            need(0 <= weight < math.inf, f"--kl-weight must be auto or a number of at least 0, not {weight}")

    def to_dict(self) -> dict[str, Any]:
        """All settings as one flat dict, those of the parts in use among them."""
        values = dataclasses.asdict(self)
        values.update(values.pop("options"))
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any], source: Path) -> Config:
        """The configuration that to_dict wrote, checked; `source` is the file named in errors."""
        fields = {f.name: f for f in dataclasses.fields(Config) if f.name != "options"}
        hints = get_type_hints(Config)
        own = {f.name: get_type_hints(s)[f.name] for s in part_settings().values() for f in dataclasses.fields(s)}
        # Settings that may change on a resume may be absent: a run of an earlier version does not have all of them.
        needed = {name for name, f in fields.items() if not f.metadata.get("free")} - ADDED_LATER
        missing = sorted(needed - set(values))
        if missing:
            raise UserError(f"{source}: setting {missing[0]!r} is missing: written by another version of bvae?")
        unknown = sorted(set(values) - set(fields) - set(own))
        if unknown:
            raise UserError(f"{source}: unknown setting {unknown[0]!r}: written by another version of bvae?")
        known: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        for name, value in known.items():
            try:
                check_type(value, own[name] if name in own else hints[name])
            except TypeCheckError as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{source}: setting {name!r} is {value!r}: {reason}") from error
        options = {name: value for name, value in known.items() if name not in fields}
        try:
            return Config(**{n: v for n, v in known.items() if n in fields}, options=options).validate()
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def changed_definition(self, other: Config) -> list[str]:
        """Names of the run-defining settings in which the two differ."""
        names = [f.name for f in dataclasses.fields(self) if not f.metadata.get("free") and f.name != "options"]
        changed = [name for name in names if getattr(self, name) != getattr(other, name)]
        if bool(self.epochs2) != bool(other.epochs2):
            changed.append("epochs2")  # how many may change, whether there is a second stage may not
        options = sorted({*self.options, *other.options})
        return changed + [name for name in options if self.option(name) != other.option(name)]

    def option(self, name: str) -> Any:
        """The value of a part's setting, its default where none is given."""
        for settings in part_settings().values():
            for f in dataclasses.fields(settings):
                if f.name == name:
                    return self.options.get(name, f.default)
        return self.options[name]


def configure(values: Mapping[str, Any], preset: str, given: set[str]) -> Config:
    """The configuration of flat settings: those of Config and, where they are not the defaults, of parts.

    A value that no part in use reads is left at its default; raises UserError where it is one of the `given` ones.
    """
    values = dict(values)
    defaults = {f.name: f.default for f in dataclasses.fields(Config) if f.name not in ("options", "preset")}
    options: dict[str, Any] = {}
    for kind, registry in KINDS.items():
        if values[kind] not in registry and kind not in given:  # a network of modules reads whatever it reads
            continue
        chosen = registry[values[kind]]
        for part in registry.parts():
            for name in set(part.reads) - set(chosen.reads):
                if name in given:
                    able = " or ".join(p.name for p in registry.parts() if name in p.reads)
                    raise UserError(f"--{flag(name)} needs --{kind} {able}, not {chosen.name}")
                if name in defaults:
                    values[name] = defaults[name]  # a preset's, for another part
        options |= {name: values[name] for name, default in chosen.own.items() if values.get(name, default) != default}
    shared = {name: value for name, value in values.items() if name in defaults}
    return Config(**shared, preset=preset, options=options)


def need(condition: bool, text: str) -> None:
    """Raises UserError with `text` where the condition does not hold."""
    if not condition:
        raise UserError(text)


def flag(name: str) -> str:
    """A setting's option without its dashes."""
    return name.replace("_", "-")
