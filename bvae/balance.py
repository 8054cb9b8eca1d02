"""The losses: a Gaussian VAE's negative ELBO, with its balance of reconstruction and KL chosen by name.

All are modules with one interface, so that swapping the balance changes one name. Nothing in them reads the device:
every result stays where the tensors are. `BALANCES` names them all; a new rule is a file of bvae/balances and a line
there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from bvae.balances.annealed import AnnealedLoss, AnnealedSettings
from bvae.balances.base import DECAY, FLOOR, GaussianVAELoss, Loss
from bvae.balances.capacity import CapacityLoss, CapacitySettings
from bvae.balances.controlvae import ControlVAELoss, ControlVAESettings
from bvae.balances.free_bits import FreeBitsLoss, FreeBitsSettings
from bvae.balances.gamma import BalancedLoss, ComputedSettings, FixedGammaLoss, LearnedGammaLoss
from bvae.balances.geco import GecoLoss, GecoSettings
from bvae.balances.moving import MovingLoss
from bvae.balances.optimal import OptimalGammaLoss, OptimalSettings
from bvae.errors import UserError

__all__ = [
    "BALANCES",
    "DECAY",
    "FLOOR",
    "AnnealedLoss",
    "AnnealedSettings",
    "Balance",
    "BalancedLoss",
    "CapacityLoss",
    "CapacitySettings",
    "ComputedSettings",
    "ControlVAELoss",
    "ControlVAESettings",
    "FixedGammaLoss",
    "FreeBitsLoss",
    "FreeBitsSettings",
    "GaussianVAELoss",
    "GecoLoss",
    "GecoSettings",
    "LearnedGammaLoss",
    "Loss",
    "MovingLoss",
    "OptimalGammaLoss",
    "OptimalSettings",
    "make_loss",
]


@dataclass(frozen=True)
class Balance:
    """A balance by name: its loss, and the dataclass of the settings that are its own."""

    name: str
    loss: type[GaussianVAELoss]
    settings: type | None = None
    takes_gamma: bool = False
    """whether the loss has a `gamma` that may be given"""

    def build(
        self,
        settings: Any = None,
        *,
        kl_weight: float | Literal["auto"] = 1.0,
        logits: bool = True,
        gamma: float | None = None,
        total_steps: int | None = None,
        accumulate: bool = False,
        manual: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> GaussianVAELoss:
        """The loss.

        Args:
            settings: an instance of `settings`; by default with its defaults.
            kl_weight, logits, accumulate, manual, process_group: as of the losses. The last three concern those whose
                state follows the batches.
            gamma: where the balance takes one; None for its default.
            total_steps: optimiser steps of the run, for the balances that are timed.

        Raises:
            ValueError: a value that cannot be; it names the argument of the loss.
        """
        arguments: dict[str, Any] = {"kl_weight": kl_weight, "logits": logits}
        if self.settings is not None:
            given = self.settings() if settings is None else settings
            arguments |= {name: getattr(given, field) for field, name in self._names().items()}
        if gamma is not None:
            if not self.takes_gamma:
                raise ValueError(f"gamma is not one of the settings of {self.name}")
            arguments["gamma"] = gamma
        if self.loss.timed:
            if total_steps is None:
                raise ValueError(f"total_steps is needed by {self.name}")
            arguments["total_steps"] = total_steps
        if issubclass(self.loss, MovingLoss):
            arguments |= {"accumulate": accumulate, "manual": manual, "process_group": process_group}
        return self.loss(**arguments)

    def check(self, settings: Any = None, gamma: float | None = None) -> None:
        """Raises UserError, naming the option, for settings or a gamma that the loss cannot be built from."""
        try:
            self.build(settings, gamma=gamma, total_steps=1)
        except ValueError as error:
            text = str(error)
            for field, name in {**self._names(), "gamma": "gamma"}.items():
                if text.startswith(f"{name} "):
                    text = f"--{field.replace('_', '-')}{text[len(name) :]}"
                    break
            raise UserError(text) from None

    def _names(self) -> Mapping[str, str]:
        """The settings' fields, and the arguments of the loss that they stand for."""
        return {} if self.settings is None else self.settings.arguments  # type: ignore[attr-defined]


BALANCES = {
    balance.name: balance
    for balance in (
        Balance("computed", BalancedLoss, ComputedSettings),
        Balance("learned", LearnedGammaLoss),
        Balance("fixed", FixedGammaLoss, takes_gamma=True),
        Balance("optimal", OptimalGammaLoss, OptimalSettings),
        Balance("annealed", AnnealedLoss, AnnealedSettings, takes_gamma=True),
        Balance("free-bits", FreeBitsLoss, FreeBitsSettings, takes_gamma=True),
        Balance("capacity", CapacityLoss, CapacitySettings, takes_gamma=True),
        Balance("geco", GecoLoss, GecoSettings),
        Balance("controlvae", ControlVAELoss, ControlVAESettings, takes_gamma=True),
    )
}


def make_loss(balance: str, settings: Any = None, **arguments: Any) -> GaussianVAELoss:
    """The loss that `--balance` names; see Balance.build for the arguments."""
    return BALANCES[balance].build(settings, **arguments)
