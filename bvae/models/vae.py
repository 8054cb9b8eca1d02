"""A VAE as an encoder and a decoder, and the two of them stacked: the model a run trains."""

from torch import Tensor, nn

from bvae.config import Config
from bvae.models.dense import DenseDecoder, DenseEncoder
from bvae.models.resnet import ResNetDecoder, ResNetEncoder


class VAE(nn.Module):
    """encoder(x) -> (mu, log_sigma) [B,k]; decoder(z) -> the reconstruction, as logits or values."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder


def first_stage(c: Config) -> VAE:
    """The ResNet VAE over images [B,C,side,side]; the decoder gives logits."""
    return VAE(
        ResNetEncoder(c.channels, c.latents, c.scales, c.blocks, c.base, c.fc),
        ResNetDecoder(c.channels, c.latents, c.side, c.blocks, c.base),
    )


def second_stage(c: Config) -> VAE:
    """The dense VAE over the first stage's latents [B,k]; the decoder gives values."""
    return VAE(DenseEncoder(c.latents, c.latents, c.hidden), DenseDecoder(c.latents, c.latents, c.hidden))


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def l2_kernels(model: VAE, groups: tuple[str, ...]) -> list[Tensor]:
    """Convolution kernels of the named parts (`encoder.downsample`, ...), for the l2 penalty."""
    modules = (m for group in groups for m in model.get_submodule(group).modules())
    return [m.weight for m in modules if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
