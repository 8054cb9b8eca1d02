"""The definition of a run: its settings, the published recipes, and the parts that settings name."""

from bvae.config.presets import PRESETS, find_preset
from bvae.config.settings import Config

__all__ = ["PRESETS", "Config", "find_preset"]
