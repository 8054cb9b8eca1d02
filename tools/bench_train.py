#!/usr/bin/env python3
"""Times bvae's training step against what people would otherwise run, side by side in one process.

    python tools/bench_train.py [--device cpu|cuda] [--rounds 5] [--json PATH]

1. stage 1 of the CIFAR-10 preset, batch 100, in images/s: bvae's step with --amp, against the plain loop (the same
   network in fp32, a DataLoader, the loss from PyTorch operations, `.item()` every step);
2. sampling + loss, forward and backward, at the same batch (100x3x32x32, k = 64), in microseconds: the fused ops,
   against the same written in eager PyTorch and against their plain twins in bvae.reference.

The contestants take turns, round after round, so that a machine whose speed drifts slows all alike; figures are
medians over rounds, ratios are medians of each round's ratio. Pixels are random: the time does not depend on them.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bvae import ops, reference
from bvae.balance import BalancedLoss
from bvae.batches import ImageBatches
from bvae.config import find_preset
from bvae.machine import describe_device, pick_device, versions
from bvae.models.vae import first_stage
from bvae.step import Step

CONFIG = find_preset("cifar10")
IMAGES = 5_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="training steps per round and contestant")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if ops.EXTENSION_ERROR is not None:
        sys.exit(f"error: nothing to measure: {ops.EXTENSION_ERROR}")
    device = pick_device(args.device)
    images = torch.randint(256, (IMAGES, 32, 32, 3), dtype=torch.uint8)

    train = rounds(
        {"bvae": bvae_step(images, device), "plain": plain_loop(images, device)}, args.rounds, args.steps, device
    )
    rate = {name: [CONFIG.batch / seconds for seconds in times] for name, times in train.items()}
    print(f"{describe_device(device)}, torch {torch.__version__}\n")
    print(f"training, {CONFIG.preset} stage 1, batch {CONFIG.batch}: images/s, median (lowest - highest)")
    for name, values in rate.items():
        print(f"  {name:16} {statistics.median(values):9.1f}   ({min(values):.1f} - {max(values):.1f})")
    speedup = ratio(train["plain"], train["bvae"])
    print(f"  bvae / plain     {speedup:9.2f}x\n")

    report: dict = {
        "command": " ".join(["python", *sys.argv]),
        "device": describe_device(device),
        "versions": versions(),
        device.type: {"stage1": {name: statistics.median(v) for name, v in rate.items()}, "bvae_over_plain": speedup},
        "ops": {},
    }
    print("sampling + loss, forward and backward, at 100x3x32x32, k = 64: microseconds, median")
    for dtype in (torch.float32, torch.bfloat16):
        calls = {name: call(device, dtype) for name, call in (("fused", fused), ("eager", eager), ("twin", twin))}
        times = rounds(calls, args.rounds, 50, device)
        name = str(dtype).removeprefix("torch.")
        micro = {n: statistics.median(t) * 1e6 for n, t in times.items()}
        ratios = {f"fused_over_{n}": ratio(times[n], times["fused"]) for n in ("eager", "twin")}
        print(f"  {name:10}" + "".join(f" {n} {t:9.1f}" for n, t in micro.items()), end="   ")
        print(f"fused is {ratios['fused_over_eager']:.1f}x eager, {ratios['fused_over_twin']:.1f}x its twin")
        report["ops"][name] = micro | ratios
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def rounds(
    contestants: dict[str, Callable[[], None]], count: int, calls: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds a call, one figure per round, of contestants that take turns; a warm-up round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(count + 1):
        for name, call in contestants.items():
            wait(device)
            started = time.perf_counter()
            for _ in range(calls):
                call()
            wait(device)
            if i:
                times[name].append((time.perf_counter() - started) / calls)
    return times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


# ---- the training step ----------------------------------------------------------------------------------------------


def bvae_step(images: Tensor, device: torch.device) -> Callable[[], None]:
    """What the trainer runs per step with --amp: gather, forward, backward, gated Adam, sums."""
    torch.manual_seed(0)
    model = first_stage(CONFIG).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = ImageBatches(images.to(device), CONFIG.batch, 0, torch.bfloat16)
    loss = BalancedLoss().to(device)
    step = Step(model, loss, ops.make_rng(0, device), CONFIG.latents, True, 0.0, [])
    step.set_lr(CONFIG.lr)
    endless = (batch for epoch in range(10**9) for batch in batches.epoch(epoch))
    return lambda: step(*next(endless))


class PlainImages(Dataset):
    """Images as people keep them: uint8 in host memory, scaled one by one."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i].permute(2, 0, 1).float() / 255


def plain_loop(images: Tensor, device: torch.device) -> Callable[[], None]:
    """The loop people write: the same network in fp32, a DataLoader, PyTorch's operations, `.item()` a step."""
    torch.manual_seed(0)
    model = first_stage(CONFIG).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=CONFIG.lr)
    loader = DataLoader(PlainImages(images), CONFIG.batch, shuffle=True, drop_last=True)
    endless = (x for _ in range(10**9) for x in loader)
    gamma2 = 1.0

    def step() -> None:
        nonlocal gamma2
        x = next(endless).to(device)
        mu, log_sigma = model.encoder(x)
        z = mu + log_sigma.exp() * torch.randn_like(mu)
        recon = torch.sigmoid(model.decoder(z))
        sse = F.mse_loss(recon, x, reduction="sum") / len(x)
        kl = 0.5 * (mu**2 + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum(1).mean()
        optimizer.zero_grad()
        (sse / (2 * gamma2) + kl).backward()
        optimizer.step()
        gamma2 = min(gamma2, 0.99 * gamma2 + 0.01 * sse.item() / x[0].numel())

    return step


# ---- the ops --------------------------------------------------------------------------------------------------------


def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    logits = torch.randn(100, 3, 32, 32, device=device).to(dtype, memory_format=torch.channels_last).requires_grad_()
    target = torch.randint(256, (100, 32, 32, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    mu = torch.randn(100, 64, device=device, requires_grad=True)
    log_sigma = torch.randn(100, 64, device=device, requires_grad=True)
    return logits, target, mu, log_sigma, torch.ones((), device=device)


def fused(device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    return _with_ops(ops, device, dtype)


def twin(device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    return _with_ops(reference, device, dtype)


def _with_ops(module, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    logits, target, mu, log_sigma, gamma2 = inputs(device, dtype)
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    rng = ops.make_rng(0, device)

    def call() -> None:
        z, kl, _ = module.sample_kl(mu, log_sigma, rng)
        loss = module.balanced_loss(logits, target, kl, gamma2, skipped, logits=True, update=True).loss
        torch.autograd.grad((loss, z), (logits, mu, log_sigma), (torch.ones_like(loss), torch.ones_like(z)))

    return call


def eager(device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """The same in plain PyTorch, with torch's own noise, gamma2 kept on the device."""
    logits, target, mu, log_sigma, gamma2 = inputs(device, dtype)

    def call() -> None:
        sigma = log_sigma.exp()
        z = mu + sigma * torch.randn_like(mu)
        kl = 0.5 * (mu**2 + sigma**2 - 2 * log_sigma - 1).sum(1).mean()
        sse = (torch.sigmoid(logits.float()) - target.float() / 255).square().sum() / 100
        elements = logits[0].numel()
        loss = sse / (2 * gamma2) + kl + elements / 2 * (gamma2.log() + math.log(2 * math.pi))
        torch.autograd.grad((loss, z), (logits, mu, log_sigma), (torch.ones_like(loss), torch.ones_like(z)))
        with torch.no_grad():
            gamma2.copy_(torch.minimum(gamma2, 0.99 * gamma2 + 0.01 * sse / elements).clamp(min=1e-8))

    return call


if __name__ == "__main__":
    main()
