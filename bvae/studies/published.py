"""Figures that others have published, each read in the publication itself or in its authors' repository.

FIDs of different tables are not comparable: protocols, splits, crops and networks differ.
"""

from bvae.studies.kinds import Published

DAI_WIPF = "Dai & Wipf, ICLR 2019, Table 1 (InfoGAN network, k 64, 10 runs; images stretched before FID)"
RAE = "Ghosh et al., ICLR 2020, Table 1 (their network, one run)"

DATA_SETS = ("mnist", "fashion", "cifar10", "celeba")

_DAI_WIPF = {
    "fixed gen1": ("52.0 ± 0.6", "84.6 ± 0.9", "160.5 ± 1.1", "55.9 ± 0.6"),
    "learned gen1": ("54.5 ± 1.0", "60.0 ± 1.1", "76.7 ± 0.8", "60.5 ± 0.6"),
    "learned gen2": ("12.6 ± 1.5", "29.3 ± 1.0", "72.9 ± 0.9", "44.4 ± 0.7"),
    "wae-mmd gen1": ("115.0 ± 1.1", "101.7 ± 0.8", "80.9 ± 0.4", "62.9 ± 0.8"),
}

# row -> data set -> (REC, samples from N: the prior, the second VAE, or a fitted Gaussian; samples from a mixture)
_RAE: dict[str, dict[str, tuple[float | None, ...]]] = {
    "vae": {"mnist": (18.26, 19.21, 17.66), "cifar10": (57.94, 106.37, 103.78), "celeba": (39.12, 48.12, 45.52)},
    "wae-mmd": {"mnist": (10.03, 20.42, 9.39), "cifar10": (35.97, 117.44, 93.53), "celeba": (34.81, 53.67, 42.73)},
    "2svae": {"mnist": (20.31, 18.81, None), "cifar10": (62.54, 109.77, None), "celeba": (42.04, 49.70, None)},
    "rae-gp": {"mnist": (14.04, 22.21, 11.54), "cifar10": (32.17, 83.05, 76.33), "celeba": (39.71, 116.30, 45.63)},
    "rae-l2": {"mnist": (10.53, 22.22, 8.69), "cifar10": (32.24, 80.80, 74.16), "celeba": (43.52, 51.13, 47.97)},
    "rae-sn": {"mnist": (15.65, 19.67, 11.74), "cifar10": (27.61, 84.25, 75.30), "celeba": (36.01, 44.74, 40.95)},
    "ae": {"mnist": (12.95, 58.73, 10.66), "cifar10": (30.52, 84.74, 76.47), "celeba": (40.79, 127.85, 45.10)},
}


def dai_wipf(row: str, data: str) -> dict[str, Published]:
    """Their figures of a row ("fixed", "learned", "wae-mmd") on a data set, by metric."""
    place = DATA_SETS.index(data)
    return {
        key.split()[1]: Published(values[place], DAI_WIPF) for key, values in _DAI_WIPF.items() if key.split()[0] == row
    }


def rae(row: str, data: str, prior: str) -> dict[str, Published]:
    """Ghosh et al.'s figures of a row on a data set, by metric; `prior` is the metric that their column N is."""
    return {
        metric: Published(f"{value:.2f}", RAE)
        for metric, value in zip(("rec", prior, "gen_gmm"), _RAE[row][data], strict=True)
        if value is not None
    }
