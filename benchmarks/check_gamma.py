#!/usr/bin/env python3
"""Measures how near the computed gamma keeps the balance to 1/2, at several batch sizes, on CIFAR-10.

    python benchmarks/check_gamma.py FOLDER [--batches 1,4,16,64,256] [--rules paper,mean] [--seed 0] [--json PATH]

FOLDER holds CIFAR-10's official binary files (data_batch_1.bin ...). A dense VAE (3072-64-16 latents and back) is
trained for each batch size and each rule: `paper` never lets gamma^2 grow, `mean` (monotone=False) does. A line gives,
over the last 20,000 images, (sum of mse) / (2 sum of gamma^2), which should be 1/2, and by how much the mse still fell
in 100 steps: the slope of a line through its logarithms over the last 2,000 steps.
"""

import argparse
import json
import math
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import bvae
from bvae import ops

WINDOW = 20_000  # images
SLOPE_STEPS = 2_000


def images(folder: Path) -> torch.Tensor:
    """The training images, uint8 [50000, 3072]."""
    files = [folder / f"data_batch_{i}.bin" for i in range(1, 6)]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise SystemExit(f"{missing[0]}: not there; FOLDER must hold CIFAR-10's binary files")
    return torch.from_numpy(np.concatenate([np.fromfile(path, np.uint8).reshape(-1, 3073)[:, 1:] for path in files]))


def measure(data: torch.Tensor, batch: int, monotone: bool, seed: int, lr: float) -> dict[str, float]:
    """Trains one VAE; returns the figures of a line."""
    steps = max(4_000, 2 * WINDOW // batch)
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 32))
    decoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3072))
    loss = bvae.BalancedLoss(monotone=monotone)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr, fused=True)
    order, rng = torch.Generator().manual_seed(seed), ops.make_rng(seed)
    mse, gamma2 = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    for step in range(steps):
        target = data[torch.randint(len(data), (batch,), generator=order)]
        mu, log_sigma = encoder(target.float() / 255).chunk(2, 1)
        z, kl, _ = ops.sample_kl(mu, log_sigma, rng)
        parts = loss(decoder(z), target, kl=kl)
        optimizer.zero_grad()
        parts.loss.backward()
        optimizer.step()
        mse[step], gamma2[step] = parts.mse, parts.gamma2
    last = max(1, WINDOW // batch)
    x = torch.arange(SLOPE_STEPS, dtype=torch.float64)
    y = mse[-SLOPE_STEPS:].log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return {
        "steps": steps,
        "mse": mse[-last:].mean().item(),
        "fall": -math.expm1(100 * slope.item()),
        "balance": (mse[-last:].sum() / (2 * gamma2[-last:].sum())).item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", default="1,4,16,64,256")
    parser.add_argument("--rules", default="paper,mean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = images(args.folder)
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, seed {args.seed}")
    rows = []
    for rule in args.rules.split(","):
        for batch in map(int, args.batches.split(",")):
            row = {"rule": rule, "batch": batch, **measure(data, batch, rule == "paper", args.seed, args.lr)}
            rows.append(row)
            print(
                "{rule:5} batch {batch:3}  {steps:6} steps  mse {mse:.4f}  falls {fall:7.3%} in 100 steps  "
                "balance {balance:.4f}".format(**row),
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "seed": args.seed, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
