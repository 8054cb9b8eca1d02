"""What defines a run: one typed dataclass, the published recipes as its presets, and the rules it must obey."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from typeguard import TypeCheckError, check_type

from bvae.errors import UserError
from bvae.reference import auto_kl_weight

Balance = Literal["computed", "learned", "fixed"]
L2Group = Literal["encoder.downsample", "encoder.scales", "decoder.upsample", "decoder.scales"]


MOST = {
    "side": 4096,
    "base": 4096,
    "blocks": 1000,
    "latents": 65_536,
    "fc": 65_536,
    "hidden": 65_536,
    "batch": 1_000_000,
    "shapes_train": 10_000_000,
    "shapes_test": 10_000_000,
}

# Defining settings that the first runs do not have: they did what the defaults say.
LATER = {"crop", "sync_bn"}


def _free(**kwargs: Any) -> Any:
    """A field that may change when a run is resumed; every other field defines the run."""
    return field(metadata={"free": True}, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run's configuration. Defaults are the paper's CIFAR-10 recipe (Asperti & Trentin 2020, section IV-A)."""

    preset: str = "cifar10"
    """Name of the recipe these settings started from."""
    data: str | None = _free(default=None)
    """Images: a folder, .zip or .tar, .npy/.npz, a prepared store, official files; `shapes` is made on the spot."""
    side: int = 32
    """Height and width of an image, a power of two."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    crop: int | Literal["square", "none"] = "square"
    """Of encoded images: side of the centred square that is kept; `square`, the largest; `none`, the whole image."""
    jpeg_roundtrip: bool = False
    """Pass every image through JPEG (quality 75, 4:2:0) first, as both reference implementations do for CIFAR-10."""
    data_seed: int = 0
    """Fixes the generated `shapes`, and which images are held out where a source has no test split."""
    hflip: bool = False
    """Mirror each training image with probability 1/2."""
    shapes_train: int = 20_000
    """Number of training images of the generated `shapes` set."""
    shapes_test: int = 2_000
    """Number of test images of the generated `shapes` set."""

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

    balance: Balance = "computed"
    """gamma computed from the running mse (the paper), learned (Dai & Wipf 2019) or fixed."""
    gamma: float | None = None
    """With --balance fixed: the decoder's standard deviation."""
    beta: float | None = None
    """With --balance fixed: the weight of the KL against sse/2, that is gamma^2."""
    kl_weight: float | Literal["auto"] = 1.0
    """Weight of the KL in stage 1; `auto` is (2*side/k)^2."""

    batch: int = 100
    """Images per step; the last partial batch of an epoch is dropped."""
    epochs: int = _free(default=700)
    """Epochs of stage 1."""
    lr: float = 1e-4
    """Adam's learning rate in stage 1."""
    lr_halve: int = 200
    """Halve stage 1's learning rate every so many epochs."""
    epochs2: int = _free(default=1400)
    """Epochs of stage 2; 0 trains stage 1 only."""
    lr2: float = 1e-4
    """Adam's learning rate in stage 2."""
    lr_halve2: int = 100
    """Halve stage 2's learning rate every so many epochs."""
    l2: float = 0.0
    """l2 * sum(w^2) over the kernels of `l2_on` is added to stage 1's loss."""
    l2_on: tuple[L2Group, ...] = ()
    """Which convolution kernels l2 acts on."""
    bn: Literal["recompute", "ema"] = "recompute"
    """At stage 1's end, recompute batch-norm statistics under the final weights, or keep the moving averages."""
    bn_batches: int = 300
    """Training batches used to recompute them."""
    sync_bn: bool = False
    """Where several processes train together: normalise over the whole batch, not over each one's part of it."""
    rescale: bool = False
    """Rescale generated latents where the second stage loses variance (the paper's last step on CelebA)."""

    seed: int = 0
    """Fixes initial weights, shuffling and noise."""
    amp: bool = False
    """Train in bf16 where the device has units for it; everything is fp32 where not, and without this."""

    max_steps: int | None = _free(default=None)
    """Cap on the steps of each stage."""
    device: Literal["auto", "cpu", "cuda"] = _free(default="auto")
    """Where to train; auto takes CUDA when there is one."""
    graph: bool = _free(default=True)
    """On CUDA, replay whole steps from a CUDA graph; the numbers do not depend on it."""
    compile: bool | None = _free(default=None)
    """Let torch.compile make the network's passes: minutes at the start of a stage, then fused operations. Left open,
    a long stage tries both and takes the faster; results differ by roundings."""
    stream: Literal["auto", "always", "never"] = _free(default="auto")
    """Read images from their file while training; auto does where a .npy file or prepared store is too large for the
    device's memory. The batches do not depend on it."""
    eval_every: int = _free(default=1)
    """Measure the test loss every so many epochs (0: only at the end)."""
    eval_images: int = _free(default=2_000)
    """Test images used for that; the final evaluation uses them all."""
    log_every: int = _free(default=100)
    """Steps between two looks at the device."""
    checkpoint_seconds: float = _free(default=60.0)
    """Seconds between two checkpoints."""
    fid_every: int = _free(default=0)
    """Measure the FIDs of reconstructions and samples every so many epochs (0: never), outside the timed steps."""
    fid_num: int = _free(default=10_000)
    """Images generated for that; of the test set no more than so many are used."""
    fid_protocol: Literal["tf1", "pytorch-fid", "clean"] = _free(default="tf1")
    """How images are brought to the network (docs/fid.md)."""
    inception: str | None = _free(default=None)
    """Weights of the network, or `download`; by default $BVAE_INCEPTION or torch's hub cache."""
    allow_few: bool = _free(default=False)
    """Measure FIDs of fewer than 2,048 images too."""
    logger: Literal["none", "wandb", "mlflow"] = _free(default="none")
    """Also log to Weights & Biases or MLflow (extras bvae[wandb], bvae[mlflow]); TensorBoard is always written."""

    @property
    def smallest_side(self) -> int:
        """Of what the encoder's last scale sees."""
        return self.side >> (self.scales - 1)

    def resolved_kl_weight(self) -> float:
        """`auto` keeps the balance found at 32x32 with 64 latents: (2*side/k)^2."""
        return auto_kl_weight(self.side, self.latents) if self.kl_weight == "auto" else float(self.kl_weight)

    def resolved_gamma(self) -> float | None:
        return math.sqrt(self.beta) if self.beta is not None else self.gamma

    def validate(self) -> Config:
        """Returns itself, or raises UserError naming the first setting that cannot be."""

        def need(condition: bool, text: str) -> None:
            if not condition:
                raise UserError(text)

        def power_of_two(n: int) -> bool:
            return n > 0 and n & (n - 1) == 0

        for name in ("scales", "blocks", "base", "latents", "fc", "hidden", "batch", "lr_halve", "lr_halve2"):
            need(getattr(self, name) >= 1, f"--{_flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("shapes_train", "shapes_test", "bn_batches", "epochs", "log_every", "eval_images"):
            need(getattr(self, name) >= 1, f"--{_flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("epochs2", "eval_every", "fid_every"):
            need(getattr(self, name) >= 0, f"--{_flag(name)} must not be negative")
        for name, most in MOST.items():  # what no machine could hold anyway, refused before it is tried
            need(getattr(self, name) <= most, f"--{_flag(name)} must be at most {most}, not {getattr(self, name)}")
        for name in ("lr", "lr2"):
            value = getattr(self, name)
            need(0 < value < math.inf, f"--{_flag(name)} must be a positive number, not {value}")
        need(0 <= self.l2 < math.inf, f"--l2 must be a number of at least 0, not {self.l2}")
        need(power_of_two(self.side) and self.side >= 4, f"--side must be a power of two from 4, not {self.side}")
        need(self.channels in (1, 3), f"--channels must be 1 or 3, not {self.channels}")
        need(isinstance(self.crop, str) or self.crop >= 1, f"--crop must be at least 1, not {self.crop}")
        fits = int(math.log2(self.side)) + 1
        need(self.scales <= fits, f"--scales {self.scales} does not fit a side of {self.side}: at most {fits}")
        need(
            self.batch > 1 or self.smallest_side > 1,
            "--batch 1 needs fewer --scales: batch norm cannot normalise one pixel",
        )
        need(self.max_steps is None or self.max_steps >= 1, f"--max-steps must be at least 1, not {self.max_steps}")
        need(self.fid_num >= 2, f"--fid-num must be at least 2, not {self.fid_num}")
        need(0 <= self.checkpoint_seconds < math.inf, "--checkpoint-seconds must be a number of at least 0")
        for name in ("seed", "data_seed"):
            need(0 <= getattr(self, name) < 2**63, f"--{_flag(name)} must be between 0 and 2^63-1")
        need(
            bool(self.l2) == bool(self.l2_on), "--l2 and --l2-on go together: name a weight and the kernels it acts on"
        )
        need(bool(self.epochs2) or not self.rescale, "--rescale needs a second stage: it contradicts --epochs2 0")
        need(len(set(self.l2_on)) == len(self.l2_on), "--l2-on names the same kernels twice")
        if self.kl_weight != "auto":
            weight = float(self.kl_weight)
            need(0 <= weight < math.inf, f"--kl-weight must be auto or a number of at least 0, not {weight}")
        given = [name for name in ("gamma", "beta") if getattr(self, name) is not None]
        if self.balance == "fixed":
            need(len(given) == 1, "--balance fixed needs exactly one of --gamma and --beta")
            # gamma^2 and its inverse must be float32 numbers.
            need(1e-15 <= getattr(self, given[0]) <= 1e15, f"--{given[0]} must be a number from 1e-15 to 1e15")
        else:
            need(not given, f"--{given[0] if given else ''} needs --balance fixed, not {self.balance}")
        return self

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any], source: Path) -> Config:
        """The configuration that to_dict wrote, checked; `source` is the file named in errors."""
        hints = get_type_hints(Config)
        unknown = sorted(set(values) - set(hints))
        # What may change on a resume may be absent: a run of an earlier version does not have every such setting.
        needed = {f.name for f in dataclasses.fields(Config) if not f.metadata.get("free")} - LATER
        missing = sorted(needed - set(values))
        if missing:
            raise UserError(f"{source}: setting {missing[0]!r} is missing: written by another version of bvae?")
        if unknown:
            raise UserError(f"{source}: unknown setting {unknown[0]!r}: written by another version of bvae?")
        known: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        for name, value in known.items():
            try:
                check_type(value, hints[name])
            except TypeCheckError as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{source}: setting {name!r} is {value!r}: {reason}") from error
        try:
            return Config(**known).validate()
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def changed_definition(self, other: Config) -> list[str]:
        """Names of the run-defining settings in which the two differ."""
        fields = [f.name for f in dataclasses.fields(self) if not f.metadata.get("free")]
        changed = [name for name in fields if getattr(self, name) != getattr(other, name)]
        if bool(self.epochs2) != bool(other.epochs2):
            changed.append("epochs2")  # how many may change, whether there is a second stage may not
        return changed


def _flag(name: str) -> str:
    return name.replace("_", "-")


_CIFAR10 = Config()
_CELEBA = Config(
    preset="celeba",
    side=64,
    crop=128,
    scales=4,
    epochs=70,
    lr=5e-5,
    lr_halve=60,
    hidden=4096,
    epochs2=140,
    lr2=5e-5,
    lr_halve2=120,
    kl_weight=4.0,
    l2=1e-3,
    l2_on=("encoder.downsample", "decoder.upsample"),
    rescale=True,
)
_CELEBA_TABLE3 = dataclasses.replace(
    _CELEBA, lr=1e-4, lr_halve=48, lr2=1e-4, kl_weight=1.0, l2=0.0, l2_on=(), rescale=False
)

PRESETS: dict[str, Config] = {
    c.preset: c
    for c in (
        # Not from the paper: sized so that both stages train in minutes on two CPU cores.
        Config(
            preset="shapes",
            data="shapes",
            base=16,
            latents=32,
            fc=256,
            hidden=512,
            kl_weight="auto",
            batch=50,
            epochs=10,
            lr=1e-3,
            lr_halve=3,
            epochs2=12,
            lr2=1e-3,
            lr_halve2=6,
            amp=True,
            eval_every=2,
        ),
        _CIFAR10,  # the paper's text
        dataclasses.replace(_CIFAR10, preset="cifar10-code", lr_halve=250, lr_halve2=400),  # the authors' code
        _CELEBA,  # the paper's best
        # Table 3's models.
        dataclasses.replace(_CELEBA_TABLE3, preset="celeba-1"),
        dataclasses.replace(_CELEBA_TABLE3, preset="celeba-2", l2=1e-3, l2_on=("decoder.upsample", "decoder.scales")),
        dataclasses.replace(_CELEBA_TABLE3, preset="celeba-3", blocks=2, l2=1e-3, l2_on=("encoder.downsample",)),
        dataclasses.replace(_CELEBA_TABLE3, preset="celeba-4", latents=128, scales=3),
    )
}


def find_preset(name: str) -> Config:
    try:
        return PRESETS[name]
    except KeyError:
        raise UserError(f"--preset {name}: there is no such preset; choose from {', '.join(PRESETS)}") from None
