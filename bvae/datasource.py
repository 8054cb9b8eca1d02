"""The images a configuration names."""

from bvae.config import Config
from bvae.data import Dataset, load
from bvae.errors import UserError


def load_data(config: Config, source: str | None = None, quiet: bool = False) -> Dataset:
    """The images of `config.data`, or of `source` read by the same settings. Raises UserError.

    Decoding shows its progress on stderr unless it is to be `quiet`.
    """
    source = source or config.data
    if source is None:
        raise UserError(
            f"--preset {config.preset} needs --data: a folder, .zip, .tar, .npy/.npz, prepared store, or `shapes`"
        )
    return load(
        source,
        side=config.side,
        channels=config.channels,
        crop=config.crop,
        jpeg_roundtrip=config.jpeg_roundtrip,
        seed=config.data_seed,
        num_train=config.shapes_train,
        num_test=config.shapes_test,
        quiet=quiet,
    )
