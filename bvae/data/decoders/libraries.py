"""Libraries that decode and resize here besides NumPy: which Pillow it is, and whether bvae's own code was built."""

import importlib
from typing import Any

import PIL
from PIL import features

PILLOW_SIMD = ".post" in PIL.__version__


def _load() -> Any:
    try:
        return importlib.import_module("bvae._image")
    except ImportError:  # not built, or libjpeg is no longer there
        return None


native: Any = _load()
"""the module `bvae._image`, or None"""


def jpeg_version() -> str | None:
    """Version of the libjpeg-turbo with which bvae's own code decodes plain JPEGs; None where Pillow does it."""
    return None if native is None else native.JPEG


def pillow_name_and_versions() -> tuple[str, dict[str, str]]:
    """("pillow" or "pillow-simd", versions of it and of what decodes JPEG for it and for bvae itself)."""
    name = "pillow-simd" if PILLOW_SIMD else "pillow"
    versions = {
        name: PIL.__version__,
        "libjpeg-turbo": features.version_feature("libjpeg_turbo"),
        "libjpeg-turbo of bvae": jpeg_version(),
    }
    return name, {library: version for library, version in versions.items() if version}
