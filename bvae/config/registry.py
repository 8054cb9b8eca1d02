"""Networks, families, balances and priors by name, each with the settings and the checks that are its own.

A part is added by one file, which declares a `Part`, and one line of a table below (docs/extending.md).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    settings: frozen dataclass of the settings that only this part has. Their names are unique over all parts; they are
        options of bvae.train and keys of config.json like the fields of Config.
    uses: fields of Config that only parts of this kind read. A preset's values of them are ignored with a part that
        does not use them, and given on the command line they are refused.
    """

    name: str
    build: Callable[..., Any]
    check: Callable[[Config], None] = _fits_all
    settings: type | None = None
    uses: tuple[str, ...] = ()
    images_only: bool = False
    """of a balance: its target is in the images' units; the second stage is trained with `computed` instead"""

    @property
    def own(self) -> dict[str, Any]:
        """The settings that only this part has, with their defaults."""
        return {} if self.settings is None else {f.name: f.default for f in dataclasses.fields(self.settings)}

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.uses, *self.own)


class Registry:
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
        self._builtin: dict[str, Part] = {}
        self._added: dict[str, Part] = {}

    def _open(self) -> None:
        if self._table is not None and not self._builtin:
            self._builtin = _imported(self._table)

    @property
    def names(self) -> tuple[str, ...]:
        self._open()
        return tuple({**self._homes, **self._builtin, **self._added})

    def add(self, part: Part) -> None:
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

    def __getitem__(self, name: str) -> Part:
        """The part of that name. Raises UserError, naming those that exist, where there is none."""
        if name not in self.names:
            raise UserError(f"--{self.kind} {name}: there is no such {self.kind}; choose from {', '.join(self.names)}")
        if name in self._added:
            return self._added[name]
        if name not in self._builtin:
            self._builtin[name] = _imported(self._homes[name])
        return self._builtin[name]

    def parts(self) -> list[Part]:
        return [self[name] for name in self.names]


def _imported(home: str) -> Any:
    module, _, attribute = home.partition(":")
    return getattr(importlib.import_module(module), attribute)


networks = Registry(
    "network",
    {
        "resnet": "bvae.models.resnet:RESNET",
        "infogan": "bvae.models.infogan:INFOGAN",
        "wae": "bvae.models.wae:WAE",
        "rae": "bvae.models.rae:RAE",
        "mlp": "bvae.models.mlp:MLP",
    },
)
"""build(config) -> (encoder, decoder) of the first stage"""

balances = Registry("balance", "bvae.balance:PARTS")
"""build(config, *, kl_weight, logits, total_steps, manual) -> GaussianVAELoss"""

KINDS = {"network": networks, "balance": balances}
"""the settings of Config that name parts"""


def part_settings() -> dict[str, type]:
    """The settings dataclasses of all parts, by the part's kind and name: "network infogan"."""
    return {
        f"{kind} {part.name}": part.settings
        for kind, registry in KINDS.items()
        for part in registry.parts()
        if part.settings is not None
    }
