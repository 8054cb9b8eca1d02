"""The trained model: two VAEs stacked, with what it takes to encode, decode and sample."""

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from bvae import ops
from bvae.config import Config
from bvae.errors import UserError
from bvae.files import encode_json, write_atomically, writing
from bvae.metrics.latent import latent_variances, variance_law
from bvae.models.posterior import Posterior
from bvae.models.vae import Network, first_stage, second_stage
from bvae.run.checkpoint import digest, encode_tensors, read_tensors
from bvae.seeds import derive

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CHUNK = 256  # images at a time: bounds memory
VARIANCE_LOSS = 0.25  # the authors' threshold on the share of variance that the second stage loses


class TwoStageVAE(nn.Module):
    """Stage 1 over images, stage 2 over stage 1's latents (None where it was not trained).

    Images are float32 [B,C,H,W] in [0,1]; methods that take images take uint8 too. All methods run in eval mode,
    without gradients, on the device of the parameters.
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

    def _images(self, images: Tensor) -> Tensor:
        c = self.config
        if images.ndim != 4 or tuple(images.shape[1:]) != c.image_shape:
            raise ValueError(f"images must be [B,{','.join(map(str, c.image_shape))}], not {list(images.shape)}")
        if not (images.is_floating_point() or images.dtype == torch.uint8):
            raise ValueError(f"images must be floats in [0,1] or uint8, not {images.dtype}")
        x = images.to(self.device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        return x.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
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
        z = z.to(self.device, torch.float32)
        return torch.cat([torch.sigmoid(self.stage1.decoder(part)).contiguous() for part in _split(z)])

    @torch.no_grad()
    def reconstruct(self, images: Tensor, *, sample: bool = False, seed: int = 0) -> Tensor:
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
            z = torch.cat([self.stage2.decoder(part) for part in _split(u)])
        scaled = self.rescales if rescale is None else rescale
        return z * self.latent_scale[stage - 1] if scaled else z

    def sample(self, n: int, stage: int = 2, seed: int = 0, rescale: bool | None = None) -> Tensor:
        """n images [n,C,side,side] in [0,1]; see sample_latents."""
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
        z_hat = torch.cat([self.stage2.decoder(self.stage2.encoder(part)[0]) for part in _split(mu)]).double()
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

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", network: Network | None = None
    ) -> Self:
        """The model that save_pretrained wrote; a finished run's folder will do. Raises UserError naming the file."""
        folder = Path(folder)
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


def _split(batch: Tensor) -> Iterator[Tensor]:
    return iter(batch.split(CHUNK) if len(batch) else (batch,))


def __getattr__(name: str) -> Any:
    """`load`, which reads a run's folder, has its home beside the rest that does."""
    if name == "load":
        return importlib.import_module("bvae.run.folder").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
