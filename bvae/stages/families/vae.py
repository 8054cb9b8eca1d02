"""The VAE: a Gaussian posterior, the prior N(0, I)."""

from bvae.config.registry import Family
from bvae.stages.objective import Ingredients, VAEObjective

BALANCED = ("balance", "gamma", "beta", "kl_weight")
"""settings that a family with a KL reads"""


def build(given: Ingredients) -> VAEObjective:
    return VAEObjective(given.balance(), given.amp, given.config.l2, given.penalised)


VAE_FAMILY = Family("vae", build, uses=BALANCED, title="VAE")
