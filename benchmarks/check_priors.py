"""Fits priors to the codes of a linear autoencoder, without training one: log-likelihood of held-out codes, and copies.

    python benchmarks/check_priors.py DATA [--latents 16] [--priors gaussian gmm] [--set gmm_components=100 ...]

The codes are an image set's first principal components, a deterministic encoder's. Prints one line of JSON a prior.
"""

import argparse
import ast
import dataclasses
import json
import os

import torch

from bvae.data import load
from bvae.machine import describe_device
from bvae.models.posterior import Posterior
from bvae.models.priors import find_prior
from bvae.prior import FITTED, copied_by


def principal_components(data: str, side: int, channels: int, latents: int) -> torch.Tensor:
    """The training images' first principal components [N,latents] float32."""
    images = torch.from_numpy(load(data, side=side, channels=channels).train)
    x = images.flatten(1).float() / 255
    x -= x.mean(0)
    basis = torch.linalg.eigh((x.T @ x / len(x)).double()).eigenvectors[:, -latents:]
    return x @ basis.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--priors", nargs="+", choices=FITTED, default=FITTED)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the priors")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    given = {name: ast.literal_eval(value) for name, value in (pair.split("=") for pair in args.set)}
    every = [f.name for name in FITTED if (kind := find_prior(name).Settings) for f in dataclasses.fields(kind)]
    if unknown := sorted(set(given) - set(every)):
        parser.error(f"--set {unknown[0]}: no prior has that setting")
    codes = Posterior(principal_components(args.data, args.side, args.channels, args.latents), None)
    print(
        json.dumps({"device": describe_device(torch.device("cpu")), "torch": torch.__version__, "cpus": os.cpu_count()})
    )
    for name in args.priors:
        kind = find_prior(name)
        known = [] if kind.Settings is None else [f.name for f in dataclasses.fields(kind.Settings)]
        settings = {key: value for key, value in given.items() if key in known}
        prior = kind(args.latents, kind.Settings(**settings) if kind.Settings is not None else None)
        figures = prior.fit(codes, seed=args.seed)
        copying = copied_by(prior, codes, args.seed)
        print(
            json.dumps({"prior": name, **settings, **figures, "copying": copying._asdict() if copying else None}),
            flush=True,
        )


if __name__ == "__main__":
    main()
