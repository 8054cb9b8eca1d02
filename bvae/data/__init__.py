"""Image data sets as uint8 arrays: generated shapes, CIFAR-10, NumPy files, prepared stores, folders of images."""

from bvae.data.dataset import Dataset, Factors, load

__all__ = ["Dataset", "Factors", "load"]
