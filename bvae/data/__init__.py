"""Image data sets as uint8 arrays: generated shapes, CIFAR-10, MNIST, NumPy files, prepared stores, encoded images."""

from bvae.data.dataset import Dataset, Factors, load
from bvae.data.store import Store

__all__ = ["Dataset", "Factors", "Store", "load"]
