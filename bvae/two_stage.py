"""The trained model: two VAEs stacked, with what it takes to encode, decode and sample."""

import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bvae import ops
from bvae.config import Config
from bvae.errors import UserError
from bvae.files import encode_json, exists, write_atomically, writing
from bvae.metrics.latent import latent_variances, variance_law
from bvae.models.half import widened
from bvae.models.posterior import Posterior
from bvae.models.vae import Network, first_stage, second_stage
from bvae.run import hub
from bvae.run.checkpoint import digest, encode_tensors, read_tensors
from bvae.seeds import derive

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CHUNK = 256  # images at a time: bounds memory
VARIANCE_LOSS = 0.25  # the authors' threshold on the share of variance that the second stage loses

Images = Tensor | np.ndarray
Array = TypeVar("Array", Tensor, np.ndarray, Images)


class Reconstruction(NamedTuple):
    """Images [B,C,H,W] in [0,1] as the model gives them back, and the posterior they come from, each [B,k]."""

    recon: Tensor
    mu: Tensor
    log_sigma: Tensor | None
    """None where the code is deterministic"""


class TwoStageVAE(nn.Module):
    """Stage 1 over images, stage 2 over stage 1's latents (None where it was not trained).

    Images are float32 [B,C,H,W] in [0,1]. Methods that take images take tensors and NumPy arrays: floats in
    [0,1] or uint8 of that shape, or uint8 [B,H,W,C]. All methods but `forward` run in eval mode, without
    gradients, on the device of the parameters. After `.half()` or `.bfloat16()` the networks compute in that type and
    latents, noise and images stay float32; after `.double()` they are float64, and the noise is float32 still.
    """

    latent_scale: Tensor
    variance_loss: Tensor

    def __init__(self, config: Config, network: Network | None = None) -> None:
        """network: stage 1's, where the configuration's name for it is not registered (see bvae.fit)."""
        super().__init__()
        self.config = config
        self.stage1 = first_stage(config, network)
        self.stage2 = second_stage(config) if config.epochs2 else None
        # The latent rescale (Asperti & Trentin 2020, section IV-B), measured on the training set at stage 2's end.
        self.register_buffer("latent_scale", torch.ones(2))  # factors for z of GEN-1 and GEN-2
        self.register_buffer("variance_loss", torch.zeros(()))

    @property
    def device(self) -> torch.device:
        return self.latent_scale.device

    @property
    def rescales(self) -> bool:
        """Whether sampling rescales latents by default: the recipe asks for it and the second stage loses variance."""
        return self.config.rescale and bool(self.variance_loss > VARIANCE_LOSS)

    def _images(self, images: Images) -> Tensor:
        """The networks' input, of their dtype. Raises ValueError or TypeError for what are no images of the model."""
        c = self.config
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.require(images, images.dtype.newbyteorder("="), ("C", "W")))
        elif not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor or a NumPy array, not {type(images).__name__}")
        shape = c.image_shape
        if images.dtype == torch.uint8 and images.ndim == 4 and tuple(images.shape[1:]) == (*shape[1:], shape[0]):
            images = images.permute(0, 3, 1, 2)
        if images.ndim != 4 or tuple(images.shape[1:]) != shape:
            raise ValueError(f"images must be [B,{','.join(map(str, shape))}], not {list(images.shape)}")
        if not (images.is_floating_point() or images.dtype == torch.uint8):
            raise ValueError(f"images must be floats in [0,1] or uint8, not {images.dtype}")
        dtype = _dtype(self.stage1)
        x = images.to(self.device)
        x = x.to(torch.promote_types(dtype, torch.float32)) / 255 if x.dtype == torch.uint8 else x
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    def forward(self, images: Images) -> Reconstruction:
        """A VAE's pass: images -> (recon, mu, log_sigma), with gradients, in the mode the module is in.

        In training mode z = mu + sigma eps, with eps float32 from torch's global generator; in eval mode, and where
        the code is deterministic, z = mu.
        `recon` holds images in [0,1]: `BalancedLoss(logits=False)(recon, images, mu, log_sigma)` is the loss to train
        with. All images go through in one batch.
        """
        mu, log_sigma = self.stage1.encode(self._images(images))
        z = mu
        if self.training and log_sigma is not None:
            z = mu + log_sigma.exp() * torch.randn_like(mu, dtype=torch.float32)
        return Reconstruction(self._decoded(z), mu, log_sigma)

    def _decoded(self, z: Tensor) -> Tensor:
        return torch.sigmoid(widened(self.stage1.decoder(z.to(_dtype(self.stage1)))))

    @torch.no_grad()
    def encode(self, images: Images) -> Posterior:
        """(mu, log_sigma), each [B,k] float32; log_sigma is None where the code is deterministic."""
        self.eval()
        encoded = [self.stage1.encode(self._images(part)) for part in _split(images)]
        widths = [log_sigma for _, log_sigma in encoded if log_sigma is not None]
        return Posterior(torch.cat([mu for mu, _ in encoded]), torch.cat(widths) if widths else None)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents [B,k] -> images [B,C,H,W] in [0,1]."""
        self.eval()
        k = self.config.latents
        if z.ndim != 2 or z.shape[1] != k:
            raise ValueError(f"z must be [B,{k}], not {list(z.shape)}")
        return torch.cat([self._decoded(part).contiguous() for part in _split(z.to(self.device))])

    @torch.no_grad()
    def reconstruct(self, images: Images, *, sample: bool = False, seed: int = 0) -> Tensor:
        """Images through the model: decoding mu, or with `sample` a z drawn from the posterior."""
        posterior = self.encode(images)
        rng = ops.make_rng(derive(seed, "reconstruct"), self.device)
        return self.decode(posterior.draw(rng) if sample else posterior.mu)

    @torch.no_grad()
    def sample_latents(self, n: int, stage: int = 2, seed: int = 0, rescale: bool | None = None) -> Tensor:
        """n latents z [n,k] to decode: stage 1 draws them from N(0,I), stage 2 from the second VAE (GEN-1, GEN-2).

        With a prior that was trained (--family vamp), stage 1 draws them from that, and they are not rescaled.

        The same seed gives the same samples on every device, up to rounding, and the first m of n are those of m.
        `rescale` overrides the recipe's choice of rescaling them. Raises UserError where stage 2 was not trained.
        """
        rng = ops.make_rng(derive(seed, "sample"), self.device)
        if stage == 1 and self.stage1.prior is not None:
            self.eval()
            return self.stage1.prior.sample(self.stage1.encoder, n, rng)
        u = ops.philox_normal(rng, n, self.config.latents)
        return self.latents_from(u, stage, rescale)

    @torch.no_grad()
    def latents_from(self, u: Tensor, stage: int = 2, rescale: bool | None = None) -> Tensor:
        """Standard normal u [n,k] -> latents z [n,k] to decode, as sample_latents makes them of its own noise.

        Raises ValueError for stage 1 of a model whose prior was trained: it is no map of such noise.
        """
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, not {stage}")
        if stage == 1 and self.stage1.prior is not None:
            raise ValueError("the first stage's prior was trained: draw its latents with sample_latents")
        self.eval()
        z = u
        if stage == 2:
            if self.stage2 is None:
                raise UserError("this model has no second stage (it was trained with --epochs2 0): sample with stage 1")
            z = torch.cat([self.stage2.decoder(part.to(_dtype(self.stage2))) for part in _split(u)])
        scaled = self.rescales if rescale is None else rescale
        return z * self.latent_scale[stage - 1] if scaled else z

    def sample(self, n: int, stage: int = 2, seed: int = 0, rescale: bool | None = None) -> Tensor:
        """n images [n,C,H,W] in [0,1]; see sample_latents."""
        return self.decode(self.sample_latents(n, stage, seed, rescale))

    @torch.no_grad()
    def measure_rescale(
        self, mu: Tensor, log_sigma: Tensor | None, seed: int = 0, samples: int = 10_000
    ) -> dict[str, float]:
        """Measures the latent rescale on the training set's posterior [N,k] and keeps it in the model.

        variance_loss = (mean_j Var(mu_j) - mean_j Var(z_hat_j)) / mse(mu, z_hat) with z_hat the second stage's
        reconstruction of mu; s = sqrt(variance law) scales z of GEN-1, s / mean_j Std(z_j) that of GEN-2.
        """
        if self.stage2 is None:
            raise ValueError("the latent rescale needs a second stage")
        self.eval()
        dtype = _dtype(self.stage2)
        means = [self.stage2.encoder(part)[0] for part in _split(mu.to(dtype))]
        z_hat = torch.cat([self.stage2.decoder(mean.to(dtype)) for mean in means]).double()
        mu = mu.double()
        var_mu, sigma2 = latent_variances(mu, log_sigma)
        lost = var_mu.mean() - z_hat.var(0, correction=0).mean()
        self.variance_loss.copy_(lost / (mu - z_hat).square().mean())
        law = variance_law(var_mu, sigma2)
        std = self.sample_latents(samples, 2, seed, rescale=False).double().std(0, correction=0).mean()
        self.latent_scale.copy_(torch.stack([law.sqrt(), law.sqrt() / std]))
        scale1, scale2 = self.latent_scale.tolist()
        return {"variance_loss": float(self.variance_loss), "scale_gen1": scale1, "scale_gen2": scale2}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`, which from_pretrained reads. Raises UserError if it cannot."""
        folder = Path(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder)
        write_atomically(
            folder / CONFIG, encode_json({"model": "bvae", "config": self.config.to_dict()}, indent=2).encode()
        )

    def save_weights(self, folder: Path) -> None:
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        write_atomically(folder / WEIGHTS, encode_tensors(tensors, {"format": "pt", "bvae_sha256": digest(tensors)}))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, message: str = "Upload a bvae model") -> str:
        """Uploads the files of save_pretrained to the Hub's model `user/name`; returns the address of the commit.

        The repository is made where it does not exist, `private` or as the user's account has it. Who uploads is
        decided by `hf auth login` or $HF_TOKEN. Raises UserError where the Hub does not take it.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload(Path(folder), repo_id, private, message)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device = "cpu",
        network: Network | None = None,
        *,
        revision: str | None = None,
    ) -> Self:
        """The model that save_pretrained or push_to_hub wrote. Nothing is unpickled.

        Args:
            name: a folder, a finished run's included; or where a string names no folder, a model `user/name` of the
                Hugging Face Hub (needs `bvae[hub]`), which is downloaded into its cache.
            network: the networks of a model that has its own.
            revision: of a model on the Hub: a branch, tag or commit; its main branch by default.

        Raises:
            UserError: naming the file that is missing, damaged or does not fit, or telling why the Hub has no model.
        """
        folder = Path(name)
        if isinstance(name, str) and hub.is_model_id(name) and not exists(folder):
            folder = hub.download(name, (CONFIG, WEIGHTS), revision)
        elif revision is not None:
            raise UserError(f"{name}: a folder has no revision {revision!r}")
        model = cls(read_config(folder), network)
        model.load_weights(folder)
        return model.to(device).eval()

    def load_weights(self, folder: Path) -> None:
        """Takes over what save_weights wrote. Raises UserError naming the file."""
        path = folder / WEIGHTS
        tensors, metadata = read_tensors(path)
        if metadata.get("bvae_sha256", digest(tensors)) != digest(tensors):
            raise UserError(f"{path}: its content does not match its SHA-256: damaged or edited by hand")
        self.load_tensors(tensors, path)

    def load_tensors(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """load_state_dict, with a UserError naming `path` and the first tensor that does not fit."""
        own = self.state_dict()
        for name in sorted(own.keys() | tensors.keys()):
            if name not in tensors:
                raise UserError(f"{path}: tensor {name} is missing: not a model of this configuration")
            if name not in own:
                raise UserError(f"{path}: unexpected tensor {name}: not a model of this configuration")
            if own[name].shape != tensors[name].shape:
                raise UserError(
                    f"{path}: tensor {name} is {list(tensors[name].shape)}, the configuration needs "
                    f"{list(own[name].shape)}"
                )
        self.load_state_dict(dict(tensors))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def to_uint8(images: Tensor) -> np.ndarray:
    """Images [N,C,H,W] in [0,1] -> uint8 [N,H,W,C], rounded to nearest."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def read_config(folder: Path) -> Config:
    """The configuration in a run's or a saved model's folder. Raises UserError naming what is wrong with it."""
    return Config.from_dict(read_run(folder)["config"], folder / CONFIG)


def read_run(folder: Path) -> dict[str, Any]:
    """`config.json` of a run or a saved model: {"config": ..., and for a run "data": ..., "versions": ...}."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: not a run or a saved model (it has no {CONFIG})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if (
        not isinstance(values, dict)
        or not isinstance(values.get("config"), dict)
        or not isinstance(values.get("data", {}), dict)
    ):
        raise UserError(f"{path}: not the configuration of a bvae model")
    return values


def _split(batch: Array) -> Iterator[Array]:
    """Parts of at most CHUNK rows; of an empty batch itself."""
    return (batch[first : first + CHUNK] for first in range(0, max(len(batch), 1), CHUNK))


def _dtype(network: nn.Module) -> torch.dtype:
    return next(p.dtype for p in network.parameters())


def __getattr__(name: str) -> Any:
    """`load`, which reads a run's folder, has its home beside the rest that does."""
    if name == "load":
        return importlib.import_module("bvae.run.folder").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
