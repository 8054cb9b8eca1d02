#!/usr/bin/env python3
"""Times every fused op, forward and backward, against eager PyTorch and torch.compile, and against the memory's speed.

    python benchmarks/bench_kernels.py [--device cpu|cuda] [--elements N] [--rounds 20] [--no-compile] [--json PATH]

Each op runs at the sizes of the paper's CIFAR-10 and CelebA steps and at one of about --elements elements, well past
the caches. Its rivals are the same operation as people write it in eager PyTorch (with torch's own noise), and its
plain twin in bvae.reference under torch.compile. All take turns, round after round; a figure is the median of the
rounds, with the 20th and 80th percentile.

bytes: what the operation has to move at least (each input read once, each output written once). share: of the bandwidth
of copying a large tensor, measured in the same run. At the paper's sizes everything fits the caches and the share says
little: there the time counts.

On CUDA a call is timed by events, as a CUDA graph, which leaves the launches from Python out: small ones many in a
graph, large ones one, each after the L2 cache was filled with something else. A call that no graph can record is timed
as Python makes it, which is said on stderr and in the JSON ("timed": "loop").
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from bvae import ops, reference
from bvae.machine import describe_device, pick_device, versions
from bvae.models import layer_ops

Call = Callable[[], Any]
RIVALS = ("fused", "eager", "compiled")
FLUSH_BYTES = 2**28  # more than any L2
SMALL_BYTES = 2**24  # calls that move less are timed many at a time
CALLS, CPU_CALLS = 100, 20
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Case:
    """One operation at one size. make: of each rival, what sets it up and returns its call."""

    op: str
    size: str
    type: str
    bytes: int
    make: dict[str, Callable[[], Call]]


# ---- the operations -------------------------------------------------------------------------------------------------


def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def forward(function: Callable, *inputs: Tensor) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return call


def backward(function: Callable, wanted: tuple[Tensor, ...], *inputs: Tensor) -> Call:
    """The backward alone: of a graph that is kept, with a gradient for each of the function's outputs."""
    outputs = function(*inputs)
    grads = [torch.randn_like(out) if out.dim() else torch.ones_like(out) for out in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def sample_cases(batch: int, k: int, size: str, device: torch.device) -> list[Case]:
    def plain(mu: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigma = log_sigma.exp()
        z = mu + sigma * torch.randn_like(mu)
        kl = 0.5 * (mu.square() + sigma.square() - 2 * log_sigma - 1)
        with torch.no_grad():
            moments = torch.stack([mu.sum(0), mu.square().sum(0), sigma.square().sum(0), kl.sum(0)])
        return z, kl.sum(), moments

    def calls(function: Callable[..., tuple], back: bool) -> Call:
        torch.manual_seed(0)
        mu = torch.randn(batch, k, device=device, requires_grad=back)
        log_sigma = torch.randn(batch, k, device=device, requires_grad=back)
        rng = ops.make_rng(0, device)
        if function is plain:
            given: tuple[Tensor, ...] = (mu, log_sigma)
        else:
            given = (mu, log_sigma, rng)
        if back:
            return backward(lambda *inputs: function(*inputs)[:2], (mu, log_sigma), *given)
        return forward(function, *given)

    n = batch * k
    cases = []
    for back, moved in ((False, 3 * 4 * n), (True, 5 * 4 * n)):
        make: dict[str, Callable[[], Call]] = {
            "fused": lambda back=back: calls(ops.sample_kl, back),
            "eager": lambda back=back: calls(plain, back),
            "compiled": lambda back=back: calls(compiled(reference.sample_kl), back),
        }
        cases.append(Case("sample_kl" + " backward" * back, f"{size} {batch}x{k}", "fp32", moved, make))
    return cases


def loss_cases(batch: int, side: int, type_name: str, size: str, device: torch.device) -> list[Case]:
    dtype = TYPES[type_name]

    def plain(recon: Tensor, target: Tensor, kl: Tensor, gamma2: Tensor, _: Tensor) -> tuple[Tensor]:
        elements, used = recon[0].numel(), gamma2.clone()
        sse = (torch.sigmoid(recon.float()) - target.float() / 255).square().sum() / len(recon)
        loss = sse / (2 * used) + kl / len(recon) + elements / 2 * (used.log() + 1.8378770664093453)
        with torch.no_grad():
            gamma2.copy_(torch.minimum(gamma2, 0.99 * gamma2 + 0.01 * sse / elements).clamp(min=1e-8))
        return (loss,)

    def of(module: Any) -> Callable[..., tuple]:
        return lambda r, t, kl, g, s: (module.balanced_loss(r, t, kl, g, s, logits=True, update=True).loss,)

    def calls(function: Callable[..., tuple], back: bool) -> Call:
        torch.manual_seed(0)
        recon = torch.randn(batch, side, side, 3, device=device).to(dtype).permute(0, 3, 1, 2).requires_grad_(back)
        target = torch.randint(256, (batch, side, side, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        kl = torch.ones((), device=device, requires_grad=back)
        gamma2, skipped = torch.ones((), device=device), torch.zeros((), dtype=torch.int64, device=device)
        if back:
            return backward(function, (recon, kl), recon, target, kl, gamma2, skipped)
        return forward(function, recon, target, kl, gamma2, skipped)

    n, width = batch * side * side * 3, dtype.itemsize
    cases = []
    for back, moved in ((False, (width + 1) * n), (True, (2 * width + 1) * n)):
        make: dict[str, Callable[[], Call]] = {
            "fused": lambda back=back: calls(of(ops), back),
            "eager": lambda back=back: calls(plain, back),
            "compiled": lambda back=back: calls(compiled(of(reference)), back),
        }
        cases.append(
            Case("balanced_loss" + " backward" * back, f"{size} {batch}x3x{side}x{side}", type_name, moved, make)
        )
    return cases


def gather_case(batch: int, side: int, images: int, type_name: str, size: str, device: torch.device) -> Case:
    dtype = TYPES[type_name]

    def plain(data: Tensor, index: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
        rows = data[index]
        rows = torch.where(flip.view(-1, 1, 1, 1), rows.flip(2), rows).permute(0, 3, 1, 2)
        return rows.to(dtype) / 255, rows

    def calls(function: Callable) -> Call:
        generator = torch.Generator().manual_seed(0)
        data = torch.randint(256, (images, side, side, 3), generator=generator, dtype=torch.uint8).to(device)
        index = torch.randperm(images, generator=generator)[:batch].to(device)
        flip = torch.randint(2, (batch,), generator=generator).bool().to(device)
        return forward(function, data, index, flip)

    def of(module: Any) -> Callable:
        return lambda data, index, flip: module.gather(data, index, flip, dtype=dtype)

    moved = batch * side * side * 3 * (1 + 1 + dtype.itemsize)
    make: dict[str, Callable[[], Call]] = {
        "fused": lambda: calls(of(ops)),
        "eager": lambda: calls(plain),
        "compiled": lambda: calls(compiled(of(reference))),
    }
    return Case("gather", f"{size} {batch}x3x{side}x{side}", type_name, moved, make)


def norm_cases(batch: int, channels: int, side: int, type_name: str, size: str, device: torch.device) -> list[Case]:
    """Batch norm with ReLU: forward two reads and a write of the images, backward four and one."""
    dtype = TYPES[type_name]

    def plain(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *_: Tensor) -> tuple[Tensor]:
        return (torch.relu(torch.nn.functional.batch_norm(x, mean, var, weight, bias, True, 1e-3, 1e-5)),)

    def of(module: Any) -> Callable[..., tuple]:
        return lambda x, weight, bias, mean, var, gathered, counters: (
            module.batch_norm_relu(x, weight, bias, (mean, var, gathered), counters, 1e-3, 1e-5),
        )

    def calls(function: Callable[..., tuple], back: bool) -> Call:
        torch.manual_seed(0)
        x = torch.randn(batch, side, side, channels, device=device).to(dtype).permute(0, 3, 1, 2).requires_grad_(back)
        weight, bias = (torch.ones(channels, device=device, requires_grad=back) for _ in range(2))
        running = [torch.zeros(shape, device=device) for shape in ((channels,), (channels,), ())]
        given = x, weight, bias, *running, torch.zeros(channels, dtype=torch.int32, device=device)
        return backward(function, (x, weight, bias), *given) if back else forward(function, *given)

    cases = []
    for back, passes in ((False, 3), (True, 5)):
        make: dict[str, Callable[[], Call]] = {
            "fused": lambda back=back: calls(of(layer_ops), back),
            "eager": lambda back=back: calls(plain, back),
            "compiled": lambda back=back: calls(compiled(of(reference)), back),
        }
        moved = passes * batch * channels * side * side * dtype.itemsize
        shape = f"{size} {batch}x{channels}x{side}x{side}"
        cases.append(Case("batch_norm_relu" + " backward" * back, shape, type_name, moved, make))
    return cases


def adam_case(width: int, layers: int, type_name: str, size: str, device: torch.device) -> Case:
    """Dense layers with gradients in the type; weights with gradients in bf16 have bf16 copies, for the next step."""
    dtype = TYPES[type_name]
    shapes = [(width, width), (width,)] * layers

    def state() -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        torch.manual_seed(0)
        parameters = [torch.randn(shape, device=device) for shape in shapes]
        grads = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
        return parameters, grads, [p.bfloat16() if dtype == torch.bfloat16 else None for p in parameters]

    def of(function: Callable) -> Call:
        parameters, grads, halves = state()
        moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
        steps, good = torch.zeros(len(shapes), device=device), torch.ones((), dtype=torch.bool, device=device)
        rate = torch.full((), 1e-4, device=device)
        return lambda: function(
            parameters, grads, *moments, halves, steps, good, rate, betas=(0.9, 0.999), eps=1e-8
        )  # fmt: skip

    def plain() -> Call:
        """As under autocast, which casts gradients back and weights again."""
        parameters, grads, halves = state()
        optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True, capturable=device.type == "cuda")

        def call() -> None:
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad.float()
            optimizer.step()
            for p, half in zip(parameters, halves, strict=True):
                if half is not None:
                    half.copy_(p)

        return call

    moved = layers * (width * width + width) * (6 * 4 + dtype.itemsize + 2 * (dtype == torch.bfloat16))
    make: dict[str, Callable[[], Call]] = {
        "fused": lambda: of(ops.adam),
        "eager": plain,
        "compiled": lambda: of(compiled(reference.adam)),
    }
    return Case("adam", f"{size} {layers}x{width}x{width}", type_name, moved, make)


def all_cases(elements: int, device: torch.device) -> list[Case]:
    large, k = max(1, elements // 3072), 64
    cases = sample_cases(100, k, "paper", device) + sample_cases(max(1, elements // k // 4), k, "large", device)
    for type_name in TYPES:
        cases += loss_cases(100, 32, type_name, "CIFAR-10", device) + loss_cases(100, 64, type_name, "CelebA", device)
        cases += loss_cases(large, 32, type_name, "large", device)
        cases.append(gather_case(100, 32, max(100, min(50_000, 8 * large)), type_name, "CIFAR-10", device))
        cases.append(gather_case(large, 32, large, type_name, "large", device))
        cases += norm_cases(100, 32, 32, type_name, "CIFAR-10", device)
        cases += norm_cases(max(2, elements // 2**15), 32, 32, type_name, "large", device)
        cases.append(adam_case(1024, min(16, -(-elements // 2**20)), type_name, "stage 2", device))
    return cases


# ---- the clock ------------------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """What is timed: `calls` calls of an operation, recorded as a CUDA graph or made one by one from Python."""

    run: Call
    calls: int
    recorded: bool


class Clock:
    """Seconds of one call. On CUDA, calls must be set up, prepared and timed on the clock's own `stream`: autograd runs
    a backward on the stream of its forward, and a graph can only record what runs on the stream it records."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.side = torch.cuda.Stream(device) if self.cuda else None
        with self.stream():
            self.flush = torch.zeros(FLUSH_BYTES // 4 if self.cuda else 0, dtype=torch.int32, device=device)

    def stream(self) -> AbstractContextManager:
        return nullcontext() if self.side is None else torch.cuda.stream(self.side)

    def prepare(self, call: Call, small: bool, name: str) -> Timed:
        """Warms the call up; small ones are taken many at a time, on CUDA as one graph where it can be recorded."""
        for _ in range(3):
            call()
        calls = (CALLS if self.cuda else CPU_CALLS) if small else 1

        def run() -> None:
            for _ in range(calls):
                call()

        if not self.cuda:
            return Timed(run, calls, recorded=False)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.side):
                run()
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"{name}: timed from Python, for no graph: {first_line(error.__context__ or error)}", file=sys.stderr)
            return Timed(run, calls, recorded=False)
        return Timed(graph.replay, calls, recorded=True)

    def seconds(self, timed: Timed, small: bool) -> float:
        if not self.cuda:
            started = time.perf_counter()
            timed.run()
            return (time.perf_counter() - started) / timed.calls
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if not small:
            self.flush.amax()  # read, for what is written would still have to leave the cache
        first.record()
        timed.run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / timed.calls


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["failed"])[0]


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return dict.fromkeys(("median", "p20", "p80"), values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def copy_bandwidth(elements: int, clock: Clock, rounds: int) -> float:
    """Bytes a second, read and written, of copying a tensor of 4 bytes an element."""
    with clock.stream():
        source = torch.rand(elements, device=clock.device)  # zeros may move faster
        target = torch.empty_like(source)
        timed = clock.prepare(lambda: target.copy_(source), small=False, name="copy")
        return 8 * elements / statistics.median(clock.seconds(timed, small=False) for _ in range(rounds))


def measure(case: Case, clock: Clock, rounds: int, rivals: tuple[str, ...]) -> dict[str, Any]:
    small = case.bytes < SMALL_BYTES
    result: dict[str, Any] = {"op": case.op, "size": case.size, "type": case.type, "bytes": case.bytes}
    prepared: dict[str, Timed] = {}
    with clock.stream():
        for rival in rivals:
            name = f"{case.op}, {case.size}: {rival}"
            try:
                prepared[rival] = clock.prepare(case.make[rival](), small, name)
            except Exception as error:  # of a compiler that cannot: the others are still worth measuring
                if rival == "fused":
                    raise
                result[rival] = None
                print(f"{name}: {first_line(error)}", file=sys.stderr)
        times: dict[str, list[float]] = {rival: [] for rival in prepared}
        for _ in range(rounds):
            for rival, timed in prepared.items():
                times[rival].append(clock.seconds(timed, small))
    for rival, values in times.items():
        result[rival] = {name: 1e6 * value for name, value in percentiles(values).items()}
        result[rival]["timed"] = "graph" if prepared[rival].recorded else "loop"
        if rival != "fused":
            pairs = zip(values, times["fused"], strict=True)
            result[f"{rival}_over_fused"] = statistics.median(a / b for a, b in pairs)
    return result


# ---- the report -----------------------------------------------------------------------------------------------------


def commit() -> str:
    """Of the source tree, "-dirty" where it was changed; "unknown" outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def line(result: dict[str, Any]) -> str:
    def cell(rival: str) -> str:
        found = result.get(rival)
        if found is None:
            return f"{'-':>10}{'':18}"
        spread = f"({found['p20']:.1f} - {found['p80']:.1f})"
        return f"{found['median']:>10.1f} {spread:<17}"

    ratios = "".join(
        f"{result[f'{rival}_over_fused']:>8.2f}x" if f"{rival}_over_fused" in result else f"{'-':>9}"
        for rival in RIVALS[1:]
    )
    return (
        f"{result['op']:<22} {result['size']:<22} {result['type']:<5} {result['bytes'] / 1e6:>8.1f} "
        + "".join(cell(rival) for rival in RIVALS)
        + f"{100 * result['share']:>6.0f}%{ratios}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--elements", type=int, help="of the large sizes (default: 2^28 on CUDA, 2^25 on a CPU)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, help="also write the figures, in microseconds, to this file")
    args = parser.parse_args(argv)
    if ops.EXTENSION_ERROR is not None:
        sys.exit(f"error: nothing to measure: {ops.EXTENSION_ERROR}")
    device = pick_device(args.device)
    elements = args.elements or (2**28 if device.type == "cuda" else 2**25)
    torch._functorch.config.donated_buffer = False  # a compiled backward is run more than once
    rivals = RIVALS[:2] if args.no_compile else RIVALS

    clock = Clock(device)
    bandwidth = copy_bandwidth(elements, clock, args.rounds)
    report: dict[str, Any] = {
        "command": " ".join(["python", *(sys.argv if argv is None else ["benchmarks/bench_kernels.py", *argv])]),
        "date": time.strftime("%Y-%m-%d"),
        "device": describe_device(device),
        "versions": versions(),
        "commit": commit(),
        "copy_bytes_per_s": bandwidth,
        "results": [],
    }
    print(f"{report['device']}, torch {torch.__version__}; copying moves {bandwidth / 1e9:.1f} GB/s")
    print("microseconds, median (20th - 80th percentile); share of the copy's bandwidth; rival over fused")
    heads = "".join(f"{rival:>10}{'':18}" for rival in RIVALS)
    print(f"{'op':<22} {'size':<22} {'type':<5} {'MB':>8} {heads}{'share':>7}{'eager':>9}{'compiled':>9}")
    for case in all_cases(elements, device):
        result = measure(case, clock, args.rounds, rivals)
        result["share"] = result["bytes"] / (result["fused"]["median"] / 1e6) / bandwidth
        report["results"].append(result)
        print(line(result), flush=True)
        torch.compiler.reset()
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
