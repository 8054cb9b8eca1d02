"""Variational autoencoders whose reconstruction/KL balance nobody has to tune (Asperti & Trentin 2020)."""

from bvae.balance import BalancedLoss, FixedGammaLoss, LearnedGammaLoss, Loss
from bvae.config import PRESETS, Config
from bvae.errors import UserError
from bvae.two_stage import TwoStageVAE, load

__all__ = [
    "PRESETS",
    "BalancedLoss",
    "Config",
    "FixedGammaLoss",
    "LearnedGammaLoss",
    "Loss",
    "TwoStageVAE",
    "UserError",
    "load",
]
