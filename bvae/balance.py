"""The losses: a Gaussian VAE's negative ELBO, with its balance of reconstruction and KL chosen by name.

All are modules with one interface, so that swapping the balance changes one name. Nothing in them reads the device:
every result stays where the tensors are. `BALANCES` names them all; a new rule is a file of bvae/balances and a line
there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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
from bvae.config.registry import Part
from bvae.errors import UserError

if TYPE_CHECKING:
    from bvae.config import Config

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
    images_only: bool = False
    """whether its target is in the images' units, so that it says nothing about latents"""

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
        Balance("capacity", CapacityLoss, CapacitySettings, takes_gamma=True, images_only=True),
        Balance("geco", GecoLoss, GecoSettings, images_only=True),
        Balance("controlvae", ControlVAELoss, ControlVAESettings, takes_gamma=True, images_only=True),
    )
}


def make_loss(balance: str, settings: Any = None, **arguments: Any) -> GaussianVAELoss:
    """The loss that `--balance` names; see Balance.build for the arguments."""
    return BALANCES[balance].build(settings, **arguments)


def _part(balance: Balance) -> Part:
    """A balance as a part of a configuration, whose settings it takes its own from."""

    def settings(config: "Config") -> Any:
        return None if balance.settings is None else config.part(balance.settings)

    def build(config: "Config", **arguments: Any) -> GaussianVAELoss:
        return balance.build(settings(config), gamma=config.resolved_gamma(), **arguments)

    def check(config: "Config") -> None:
        given = [name for name in ("gamma", "beta") if getattr(config, name) is not None]
        if given and not balance.takes_gamma:
            able = ", ".join(other.name for other in BALANCES.values() if other.takes_gamma)
            raise UserError(f"--{given[0]} needs --balance {able}, not {balance.name}")
        if balance.name == "fixed" and len(given) != 1:
            raise UserError("--balance fixed needs exactly one of --gamma and --beta")
        if len(given) > 1:
            raise UserError("--gamma and --beta say the same thing: give one of them")
        if given and not 1e-15 <= getattr(config, given[0]) <= 1e15:  # gamma^2 and its inverse are float32 numbers
            raise UserError(f"--{given[0]} must be a number from 1e-15 to 1e15")
        balance.check(settings(config), config.resolved_gamma())

    uses = ("gamma", "beta") if balance.takes_gamma else ()
    return Part(balance.name, build, check, balance.settings, uses, balance.images_only)


PARTS = {name: _part(balance) for name, balance in BALANCES.items()}
