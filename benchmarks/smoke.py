#!/usr/bin/env python3
"""The first half minute on a GPU: does everything run there, and about how fast?

    python benchmarks/smoke.py [--device cpu|cuda] [--json PATH]            each op once; 200 steps a stage, timed
    python benchmarks/smoke.py --profile [--device cpu|cuda] [--json PATH]  kernels of five replays, by time and count

Steps are those of `cifar10` as `python -m bvae.train --amp --no-compile` runs them, on random images.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_train import Run, configure, contestant, timed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bvae import ops, reference
from bvae.engine.graph import STEPS
from bvae.machine import describe_device, pick_device, prepare_process, versions
from bvae.models import layer_ops

RECIPE = "cifar10"
TIMED = 200
PROFILED = 5 * STEPS  # five replays of a graph


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--profile", action="store_true", help="list kernels in place of timing steps")
    parser.add_argument("--quick", action="store_true", help="a tiny network and few steps: does it all work?")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if ops.EXTENSION_ERROR is not None:
        sys.exit(f"error: nothing to try: {ops.EXTENSION_ERROR}")
    device = pick_device(args.device)
    prepare_process()
    report: dict[str, Any] = {"device": describe_device(device), "versions": versions()}
    print(f"{report['device']}, torch {torch.__version__}")
    if not args.profile:
        report["ops"] = {name: try_op(name, device) for name in OPS}
    for stage in (1, 2):
        run = contestant("bvae_no_compile", configure(RECIPE, args.quick), stage, device)
        run(2 * STEPS)
        if args.profile:
            report[f"stage{stage}"] = profiled(run, STEPS if args.quick else PROFILED, device)
        else:
            steps = STEPS if args.quick else TIMED
            report[f"stage{stage}"] = {"steps_per_s": steps / timed(run, steps, device)}
            print(f"stage {stage}: {report[f'stage{stage}']['steps_per_s']:.1f} steps/s", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")


# ---- each op against its twin ---------------------------------------------------------------------------------------


def sampled(module: Any, device: torch.device) -> Iterator[Tensor]:
    mu, log_sigma = (torch.linspace(-1, 1, 640, device=device).view(10, 64).requires_grad_() for _ in range(2))
    z, kl, moments = module.sample_kl(mu, log_sigma, ops.make_rng(0, device))
    yield from (z, kl, moments, *torch.autograd.grad(z.square().sum() + kl, (mu, log_sigma)))


def lost(module: Any, device: torch.device) -> Iterator[Tensor]:
    recon = torch.linspace(-3, 3, 7680, device=device).view(10, 3, 16, 16).requires_grad_()
    rows = (torch.arange(7680, device=device) % 256).byte().view(10, 3, 16, 16)
    gamma2, skipped = torch.tensor(0.3, device=device), torch.tensor(0, device=device)
    kl = torch.tensor(5.0, device=device, requires_grad=True)
    loss, sse, stats = module.balanced_loss(recon, rows, kl, gamma2, skipped, logits=True, update=True)
    yield from (loss, sse, stats, gamma2.clone(), *torch.autograd.grad(loss, (recon, kl)))


def gathered(module: Any, device: torch.device) -> Iterator[Tensor]:
    data = (torch.arange(15360, device=device) % 251).byte().view(5, 32, 32, 3)
    flip = torch.tensor([True, False], device=device)
    yield from module.gather(data, torch.tensor([4, 1], device=device), flip, dtype=torch.bfloat16)


def normalised(module: Any, device: torch.device) -> Iterator[Tensor]:
    x = torch.linspace(-1, 2, 10240, device=device).cos().view(10, 32, 8, 4)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias, offset = (torch.linspace(0.5, 1, 32, device=device).requires_grad_() for _ in range(3))
    running = tuple(torch.zeros(shape, device=device) for shape in ((32,), (32,), ()))
    counters = torch.zeros(32, dtype=torch.int32, device=device)
    module = layer_ops if module is ops else module
    y, through = module.batch_norm_relu(x, weight, bias, running, counters, 0.1, 1e-5, offset=offset, through=True)
    end = module.add_biased(y, through, bias, offset, counters)
    yield from (y, end, *running, *torch.autograd.grad(end.square().sum(), (x, weight, bias, offset)))


def stepped(module: Any, device: torch.device) -> Iterator[Tensor]:
    tensors = [torch.linspace(-1, 1, n, device=device) for n in (1000, 7)]
    m, v = ([torch.zeros_like(t) for t in tensors] for _ in range(2))
    halves = [t.bfloat16() for t in tensors]
    kept = [torch.empty_like(t) for t in tensors]
    counts, lr = torch.zeros(2, device=device), torch.tensor(1e-3, device=device)
    module.copy_all(kept, tensors)
    good = module.all_finite(tensors)
    module.adam(tensors, kept, m, v, halves, counts, good, lr, betas=(0.9, 0.999), eps=1e-8)
    sums = [torch.zeros(n, dtype=torch.float64, device=device) for n in ((1,), (7,), (2,), ())]
    module.end_step(torch.zeros_like(good), tensors[0][:1], kept[1], *sums, tensors[1:], kept[1:])
    yield from (good, *tensors, *m, *v, *halves, *sums)


OPS: dict[str, Callable[[Any, torch.device], Iterator[Tensor]]] = {
    "sample_kl": sampled,
    "balanced_loss": lost,
    "gather": gathered,
    "batch_norm_relu": normalised,
    "adam": stepped,
}


def try_op(name: str, device: torch.device) -> float:
    """How far the op is from its twin, relative to the largest value; ends the process where that is too far."""
    worst = 0.0
    for ours, twin in zip(OPS[name](ops, device), OPS[name](reference, device), strict=True):
        ours, twin = ours.detach().double(), twin.detach().double()
        worst = max(worst, ((ours - twin).abs().max() / twin.abs().max().clamp(min=1e-3)).item())
    print(f"{name}: {worst:.1e} from its twin", flush=True)
    if not worst < 1e-2:
        sys.exit(f"error: {name} is {worst:.1e} from its twin")
    return worst


# ---- a profile ------------------------------------------------------------------------------------------------------


def profiled(run: Run, steps: int, device: torch.device) -> list[dict[str, Any]]:
    """Kernels of `steps` steps (on a CPU operations) with their count and microseconds a step, the longest first."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run(steps)
        if cuda:
            torch.cuda.synchronize()
    rows = [
        {
            "kernel": event.key,
            "count": event.count / steps,
            "microseconds": (event.self_device_time_total if cuda else event.self_cpu_time_total) / steps,
        }
        for event in profiler.key_averages()
    ]
    rows.sort(key=lambda row: -row["microseconds"])
    together, launches = (sum(row[name] for row in rows) for name in ("microseconds", "count"))
    print(f"\n{steps} steps: {together:.0f} us and {launches:.1f} kernels a step")
    for row in rows[:40]:
        print(f"{row['microseconds']:9.1f} us {row['count']:7.1f}  {row['kernel'][:110]}")
    sys.stdout.flush()
    return rows


if __name__ == "__main__":
    main()
