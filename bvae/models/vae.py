"""A VAE as an encoder and a decoder, and how the networks of both stages are made."""

from collections.abc import Callable
from inspect import Parameter, signature

import torch
from torch import Tensor, nn

from bvae.config import Config
from bvae.config.registry import families, networks
from bvae.errors import UserError
from bvae.models.dense import DenseDecoder, DenseEncoder
from bvae.models.posterior import Posterior
from bvae.models.vamp import VampPrior

CUSTOM = "custom"  # the name, in a configuration, of a network that was given as modules

Pair = tuple[nn.Module, nn.Module]
Network = Pair | Callable[..., Pair]
"""an encoder and a decoder, or a function that makes them, of the configuration or of nothing"""


class VAE(nn.Module):
    """encoder(x) -> (mu, log_sigma) [B,k]; decoder(z) -> the reconstruction, as logits or values.

    Args:
        deterministic: the code of x is mu. The encoder may then give mu alone.
        prior: p(z), where it is trained with the networks; None for N(0, I).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        deterministic: bool = False,
        prior: VampPrior | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.deterministic = deterministic
        self.prior = prior

    def encode(self, x: Tensor) -> Posterior:
        """q(z|x) of x; its log_sigma is None where the code is deterministic."""
        encoded = self.encoder(x)
        mu, log_sigma = encoded if isinstance(encoded, tuple | list) else (encoded, None)
        return Posterior(mu, None if self.deterministic else log_sigma)


def first_stage(c: Config, network: Network | None = None) -> VAE:
    """The VAE over images [B,C,H,W]; the decoder gives logits.

    Args:
        network: in place of the one that the configuration names.

    Raises UserError where the configuration names none that is registered, and none is given.
    """
    if network is None and c.network not in networks:
        raise UserError(
            f"the network {c.network!r} of this run is neither registered nor given: give its modules "
            f"(bvae.load(run, network=(encoder, decoder))), or call bvae.register_network({c.network!r}, build) first"
        )
    family = families[c.family]
    make = network or networks[c.network].build
    encoder, decoder = make if isinstance(make, tuple) else _call(make, c, family.deterministic)
    return VAE(encoder, decoder, family.deterministic, None if family.prior is None else family.prior(c))


def _call(build: Callable[..., Pair], c: Config, deterministic: bool) -> Pair:
    """build(c), or build() of a function that asks for nothing; one that knows `deterministic` is told."""
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature(build).parameters
    asks = any(p.default is Parameter.empty and p.kind in positional for p in parameters.values())
    told = {"deterministic": True} if deterministic and "deterministic" in parameters else {}
    return build(*([c] if asks else []), **told)


def second_stage(c: Config) -> VAE:
    """The dense VAE over the first stage's latents [B,k]; the decoder gives values."""
    return VAE(DenseEncoder(c.latents, c.latents, c.hidden), DenseDecoder(c.latents, c.latents, c.hidden))


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def penalised_modules(model: VAE, groups: tuple[str, ...]) -> list[nn.Module]:
    """Convolutions of the named parts (`encoder.downsample`, ...), whose kernels the l2 penalty is on."""
    modules = (m for group in groups for m in model.get_submodule(group).modules())
    return [m for m in modules if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


@torch.no_grad()
def latents_of(model: VAE, c: Config) -> int:
    """k of a first stage, found by passing two grey images; the networks keep their state.

    Raises UserError where encoder and decoder do not fit each other or the images.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    x = torch.full((2, *c.image_shape), 0.5, device=device).contiguous(memory_format=torch.channels_last)
    try:
        mu, log_sigma = model.encode(x)
        recon = model.decoder(mu)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the network does not take images {list(x.shape)}: {reason}") from error
    finally:
        model.train(was_training)
    if mu.ndim != 2 or len(mu) != 2 or (log_sigma is not None and log_sigma.shape != mu.shape):
        given = [list(mu.shape)] + ([list(log_sigma.shape)] if log_sigma is not None else [])
        raise UserError(f"the encoder must give (mu, log_sigma), each [B,k]; it gives {given} of 2 images")
    if log_sigma is None and not model.deterministic:
        raise UserError(f"the encoder must give (mu, log_sigma) for --family {c.family}; it gives mu alone")
    if recon.shape != x.shape:
        raise UserError(f"the decoder must give logits {list(x.shape)}; it gives {list(recon.shape)}")
    return mu.shape[1]
