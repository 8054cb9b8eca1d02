"""Networks, families, balances and priors by name, each with the settings and the checks that are its own.

A part is added by one file, which declares a `Part`, and one line of a table below (docs/extending.md).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bvae.errors import UserError

if TYPE_CHECKING:
    from bvae.config.settings import Config


def _fits_all(config: Config) -> None:
    """The check of a part that any configuration suits."""


@dataclass(frozen=True)
class Part:
    """A network, family, balance or prior that a configuration can name.

    build: makes it; the arguments depend on the kind of part (see the registries below).
    check: raises UserError for a configuration that the part cannot be built from. It runs before anything is read.
    settings: frozen dataclass of settings that Config does not have, or several. Their names are unique over all parts,
        but parts of a kind may share a dataclass; they are options of bvae.train and keys of config.json like the
        fields of Config.
    uses: fields of Config that only parts of this kind read. A preset's values of them are ignored with a part that
        does not use them, and given on the command line they are refused.
    """

    name: str
    build: Callable[..., Any]
    check: Callable[[Config], None] = _fits_all
    settings: type | tuple[type, ...] | None = None
    uses: tuple[str, ...] = ()
    images_only: bool = False
    """True for a balance whose target is in the images' units; the second stage then takes `computed` instead"""

    @property
    def own(self) -> dict[str, Any]:
        """The part's settings that Config does not have, with their defaults."""
        return {f.name: f.default for settings in self.groups for f in dataclasses.fields(settings)}

    @property
    def groups(self) -> tuple[type, ...]:
        """The dataclasses of `settings`."""
        return self.settings if isinstance(self.settings, tuple) else () if self.settings is None else (self.settings,)

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.uses, *self.own)


@dataclass(frozen=True)
class Family(Part):
    """The objective of the first stage, by name; its `build` takes a bvae.stages.objective.Ingredients.

    deterministic: the encoder gives the code mu alone. There is no KL, no gamma and no balance then, and the second
        stage is trained on the codes.
    title: what a model of the family is called in a report; its name where it is empty.
    prior: makes the prior p(z) that is trained with the networks, of a configuration: a bvae.models.vamp.VampPrior, or
        what has its interface. None where it is N(0, I).
    """

    deterministic: bool = False
    title: str = ""
    prior: Callable[[Config], Any] | None = None


P = TypeVar("P", bound=Part)


class Registry(Generic[P]):
    """The parts of one kind.

    Args:
        kind: the setting that names a part, such as "network".
        builtin: name -> "module:attribute" of a Part, imported when it is asked for; or "module:attribute" of a whole
            table of them.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str] | str) -> None:
        self.kind = kind
        self._table = builtin if isinstance(builtin, str) else None
        self._homes = {} if isinstance(builtin, str) else dict(builtin)
        self._builtin: dict[str, P] = {}
        self._added: dict[str, P] = {}

    def _open(self) -> None:
        if self._table is not None and not self._builtin:
            self._builtin = _imported(self._table)

    @property
    def names(self) -> tuple[str, ...]:
        self._open()
        return tuple({**self._homes, **self._builtin, **self._added})

    def add(self, part: P) -> None:
        """Makes a part available under its name. Raises ValueError where a built-in part has that name."""
        self._open()
        if part.name in self._homes or part.name in self._builtin:
            raise ValueError(f"{self.kind} {part.name!r} is built in: choose another name")
        self._added[part.name] = part

    def remove(self, name: str) -> None:
        """Takes away a part that `add` gave, if it is there."""
        self._added.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> P:
        """The part of that name. Raises UserError, naming those that exist, where there is none."""
        if name not in self.names:
            raise UserError(f"--{self.kind} {name}: there is no such {self.kind}; choose from {', '.join(self.names)}")
        if name in self._added:
            return self._added[name]
        if name not in self._builtin:
            self._builtin[name] = _imported(self._homes[name])
        return self._builtin[name]

    def parts(self) -> list[P]:
        return [self[name] for name in self.names]


def _imported(home: str) -> Any:
    module, _, attribute = home.partition(":")
    return getattr(importlib.import_module(module), attribute)


networks: Registry[Part] = Registry(
    "network",
    {
        "resnet": "bvae.models.resnet:RESNET",
        "infogan": "bvae.models.infogan:INFOGAN",
        "wae": "bvae.models.wae:WAE",
        "rae": "bvae.models.rae:RAE",
        "mlp": "bvae.models.mlp:MLP",
    },
)
"""build(config) -> (encoder, decoder) of stage 1; build(config, deterministic=True): an encoder that gives mu alone"""

families: Registry[Family] = Registry(
    "family",
    {
        "vae": "bvae.stages.families.vae:VAE_FAMILY",
        "ae": "bvae.stages.families.ae:AE",
        "rae-l2": "bvae.stages.families.rae:RAE_L2",
        "rae-gp": "bvae.stages.families.rae_gp:RAE_GP",
        "rae-sn": "bvae.stages.families.rae:RAE_SN",
        "wae-mmd": "bvae.stages.families.wae_mmd:WAE_MMD",
        "info-vae": "bvae.stages.families.wae_mmd:INFO_VAE",
        "vamp": "bvae.stages.families.vamp:VAMP",
    },
)
"""build(ingredients) -> the objective of the first stage"""

balances: Registry[Part] = Registry("balance", "bvae.balance:PARTS")
"""build(config, *, kl_weight, logits, total_steps, manual) -> GaussianVAELoss"""

KINDS: dict[str, Registry[Any]] = {"network": networks, "family": families, "balance": balances}
"""The settings of Config that name parts. A family stands before the balance, which some families do not have."""


def part_settings() -> dict[str, type]:
    """The settings dataclasses of all parts, by kind and names of the parts that have them: "network infogan"."""
    owners: dict[type, tuple[str, list[str]]] = {}
    for kind, registry in KINDS.items():
        for part in registry.parts():
            for settings in part.groups:
                owners.setdefault(settings, (kind, []))[1].append(part.name)
    return {f"{kind} {', '.join(names)}": settings for settings, (kind, names) in owners.items()}
