"""The images a configuration names."""

from typing import Any

import torch

from bvae.batches.streamed import stays_in_file
from bvae.config import Config
from bvae.data import Dataset, load
from bvae.data.splits import given_fractions
from bvae.errors import UserError


def data_arguments(config: Config, source: str | None = None) -> dict[str, Any]:
    """Everything that decides which images a configuration names, as arguments of bvae.data.load.

    Equal arguments give equal images. Raises UserError where there is no source.
    """
    source = source or config.data
    if source is None:
        raise UserError(
            f"--preset {config.preset} needs --data: a folder, .zip, .tar, .npy/.npz, prepared store, or `shapes`"
        )
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    return {
        "path": source,
        "side": config.side,
        "channels": config.channels,
        "crop": config.crop,
        "partition": config.partition,
        "fractions": None if config.split is None else given_fractions(config.split),
        "jpeg_roundtrip": config.jpeg_roundtrip,
        "seed": config.data_seed,
        "num_train": config.shapes_train,
        "num_test": config.shapes_test,
        "mapped": stays_in_file(source, config.stream, device),
    }


def load_data(config: Config, source: str | None = None, quiet: bool = False) -> Dataset:
    """The images of `config.data`, or of `source` read by the same settings. Raises UserError.

    A .npy file or prepared store that is to be read while training stays mapped. Decoding shows its progress on stderr
    unless it is to be `quiet`.
    """
    return load(**data_arguments(config, source), quiet=quiet)
