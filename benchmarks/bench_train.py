#!/usr/bin/env python3
"""Times bvae's training against what people would otherwise run: same network, batch and data, side by side.

    python benchmarks/bench_train.py [--device cpu|cuda] [--recipes cifar10 celeba] [--json PATH]
    python benchmarks/bench_train.py --quick          every contestant there is, on a tiny network: does it all work?

The contestants, each over stage 1 and stage 2 of a recipe:

    bvae             what `python -m bvae.train --amp` runs a step of a long stage: on CUDA from a CUDA graph, compiled
                     where it finds that faster (the JSON tells)
    bvae_no_compile  the same with `--no-compile`
    plain            the loop people write: fp32, DataLoader, PyTorch's own layers and loss, `.item()` every step
    eager_amp        a careful loop: data on the device, bf16 autocast, channels_last, fused Adam, nothing read back
    compile          the same with torch.compile(mode="max-autotune") over network and loss
    pythae           pythae's BaseTrainer, with amp on CUDA (none on a CPU); left out where it is not installed

Each is a process of its own, with what it would have set in it: bvae's are told what bvae.train tells them, the others
are left as PyTorch starts. One after the other takes turns with bvae, round after round, so that a machine whose speed
drifts slows both alike; before the first turn a contestant compiles, and runs for a second. Figures are medians over
rounds, ratios medians of each round's ratio, against `bvae`, or the first of bvae's that there is. Each is printed,
and the JSON written, once its contestant is through. Pixels and latents are random: the time does not depend on them.
benchmarks/bench_table.py writes the JSON's table into the documents.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bvae import ops
from bvae.balance import BalancedLoss
from bvae.batches.resident import Batches, ImageBatches, LatentBatches
from bvae.config import Config, find_preset
from bvae.engine.compiling import choose_way
from bvae.engine.graph import run_steps
from bvae.engine.step import Step
from bvae.machine import describe_device, has_bf16, pick_device, prepare_process, training_kernels, versions
from bvae.models.conv import Conv3x3, ConvTranspose3x3
from bvae.models.half import Linear, LinearReLU
from bvae.models.norm import BatchNormReLU
from bvae.models.vae import VAE, first_stage, penalised_modules, second_stage
from bvae.stages.objective import Noise, VAEObjective

SAMPLES = 5_000
Run = Callable[[int], None]  # trains so many steps
FACTS: dict[str, Any] = {}  # what there is to tell of this process's contestant beside its times


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--recipes", nargs="+", default=["cifar10", "celeba"], help="presets of bvae.train")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="of a turn, about; default 2, with --quick 0")
    parser.add_argument("--quick", action="store_true", help="a tiny network, one step a turn")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=3, metavar=("RECIPE", "STAGE", "CONTESTANT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if ops.EXTENSION_ERROR is not None:
        sys.exit(f"error: nothing to measure: {ops.EXTENSION_ERROR}")
    device = pick_device(args.device)
    if args.serve:
        recipe, stage, name = args.serve
        serve(name, configure(recipe, args.quick), int(stage), device)
        return

    names = [n for n in args.contestants if n != "pythae" or importlib.util.find_spec("pythae")]
    names.sort(key=lambda name: not name.startswith("bvae"))  # the first of which is what the others are compared with
    figures: dict[str, Any] = {}
    report = {
        "command": command(sys.argv[1:] if argv is None else argv),
        "device": describe_device(device),
        "bf16": has_bf16(device),
        "versions": versions() | pythae_version(names),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        device.type: figures,
    }
    print(f"{report['device']}, torch {torch.__version__}, commit {report['commit']}")
    seconds = args.seconds if args.seconds is not None else 0.0 if args.quick else 2.0
    rounds = 1 if args.quick else args.rounds
    for recipe in args.recipes:
        figures[recipe] = {}
        for stage in (1, 2):
            config = configure(recipe, args.quick)
            head(recipe, stage, config)
            measured = figures[recipe][f"stage{stage}"] = {}
            contestants = (Contestant(name, recipe, stage, args.device, args.quick) for name in names)
            for name, values in measure(contestants, config.batch, rounds, seconds):
                measured[name] = values
                show(name, values)
                if args.json:
                    args.json.write_text(json.dumps(with_totals(report, figures, args.recipes[0]), indent=2) + "\n")


def with_totals(report: dict[str, Any], figures: dict[str, Any], first: str) -> dict[str, Any]:
    """The report, with the images a second of the first recipe where they are easily found."""
    for stage, measured in figures[first].items():
        figures[stage] = {name: values["images_per_s"] for name, values in measured.items()}
    figures.update(figures["stage1"])
    return report


def command(argv: list[str]) -> str:
    """What was run, less where its result went."""
    words = ["python", "benchmarks/bench_train.py", *argv]
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return " ".join(words)


def configure(recipe: str, quick: bool) -> Config:
    config = find_preset(recipe)
    if quick:
        config = dataclasses.replace(config, side=16, base=4, fc=8, latents=4, hidden=8, scales=2, batch=10)
    return config


class Contestant:
    """One of them, in a process of its own that waits for its turns."""

    def __init__(self, name: str, recipe: str, stage: int, device: str, quick: bool) -> None:
        words = [sys.executable, __file__, "--device", device, "--serve", recipe, str(stage), name]
        self.name = name
        self.process = subprocess.Popen(
            words + ["--quick"] * quick, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def time(self, steps: int) -> float:
        """Seconds that so many steps take."""
        return float(self._ask(steps))

    def end(self) -> dict[str, Any]:
        """What there is to tell of it; "peak_memory_mib": of torch's allocator on CUDA, of the process on a CPU."""
        facts: dict[str, Any] = json.loads(self._ask(0))
        self.process.communicate()
        return facts

    def _ask(self, steps: int) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which reading tells
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            sys.exit(f"error: {self.name} ended with exit code {self.process.wait()}")
        return answer


def serve(name: str, config: Config, stage: int, device: torch.device) -> None:
    """The other end of a `Contestant`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if name.startswith("bvae"):
        prepare_process()
    run = contestant(name, config, stage, device)
    for line in sys.stdin:
        steps = int(line)
        facts = {"peak_memory_mib": peak_memory(device), **FACTS}
        print(timed(run, steps, device) if steps else json.dumps(facts), file=answers, flush=True)


def measure(
    contestants: Iterable[Contestant], batch: int, rounds: int, seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, figures) of one contestant after the other, each of which is ended; of the base once more at the end.

    The base is the first of bvae's, with which the others take turns.
    """
    base: Turns | None = None
    for one in contestants:
        turns = Turns(one, seconds)
        ratios = []
        for _ in range(rounds):
            before = base.take() if base is not None else turns.take()
            ratios.append(turns.take() / before if base is not None else 1.0)
        if base is None and one.name.startswith("bvae"):
            base = turns
            yield one.name, turns.figures(batch, ratios)
        else:
            yield one.name, turns.figures(batch, ratios if base is not None else None) | one.end()
    if base is not None:
        yield base.one.name, base.figures(batch, [1.0]) | base.one.end()


class Turns:
    """A contestant that has warmed up, and the time a step took in each of its turns."""

    def __init__(self, one: Contestant, seconds: float) -> None:
        self.one = one
        self.times: list[float] = []
        one.time(2)  # compiles and captures
        # The first steps of a process are no measure: a GPU raises its clock, allocators find their blocks.
        steps, left = 1, min(1.0, seconds)
        while (took := one.time(steps)) < left:
            left -= took
            steps *= 2
        self.steps = max(1, round(seconds * steps / took))

    def take(self) -> float:
        """Seconds a step in one more turn."""
        self.times.append(self.one.time(self.steps) / self.steps)
        return self.times[-1]

    def figures(self, batch: int, ratios: list[float] | None) -> dict[str, Any]:
        rates = [batch / t for t in self.times]
        figures = {
            "images_per_s": statistics.median(rates),
            "lowest": min(rates),
            "highest": max(rates),
            "steps_per_s": 1 / statistics.median(self.times),
        }
        return figures if ratios is None else {**figures, "bvae_is_faster_by": statistics.median(ratios)}


def contestant(name: str, c: Config, stage: int, device: torch.device) -> Run:
    """What trains, with the kernels that bvae.train has CUDA take at its precision."""
    kernels = functools.partial(training_kernels, device, amp=has_bf16(device) and name != "plain")
    with kernels():
        run = CONTESTANTS[name](c, stage, device)

    def run_so(steps: int) -> None:
        with kernels():
            run(steps)

    return run_so


def timed(run: Run, steps: int, device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    run(steps)
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def head(recipe: str, stage: int, config: Config) -> None:
    print(f"\n{recipe} ({config.side}x{config.side}), stage {stage}, batch {config.batch}")
    print(
        f"  {'':15} {'images/s':>10}  {'lowest - highest':>21} {'steps/s':>9} {'bvae is':>8} {'peak MiB':>9}",
        flush=True,
    )


def show(name: str, f: dict[str, Any]) -> None:
    span = f"{f['lowest']:.1f} - {f['highest']:.1f}"
    faster = f"{f['bvae_is_faster_by']:.2f}x" if "bvae_is_faster_by" in f else ""
    memory = f"{f['peak_memory_mib']:9.0f}" if "peak_memory_mib" in f else ""
    print(f"  {name:15} {f['images_per_s']:10.1f}  {span:>21} {f['steps_per_s']:9.2f} {faster:>8} {memory}", flush=True)


# ---- memory, versions -----------------------------------------------------------------------------------------------


def peak_memory(device: torch.device) -> float:
    """MiB: on CUDA what torch's allocator held at most, on a CPU what the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage, whose figure a new process takes over from the one that started it.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def pythae_version(names: list[str]) -> dict[str, str]:
    return {"pythae": importlib.metadata.version("pythae")} if "pythae" in names else {}


def commit() -> str:
    """The commit that is measured; with a + where the working tree differs from it."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, cwd=here, check=True, capture_output=True, text=True).stdout.strip()
    return "unknown"


# ---- data and network, the same for all -----------------------------------------------------------------------------


def images(c: Config) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (max(SAMPLES, c.batch), c.side, c.side, c.channels), dtype=torch.uint8, generator=g)


def latents(c: Config) -> tuple[Tensor, Tensor]:
    """A posterior over as many samples."""
    g = torch.Generator().manual_seed(0)
    mu = torch.randn(max(SAMPLES, c.batch), c.latents, generator=g)
    return mu, mu.abs() / 4 - 2


def network(c: Config, stage: int) -> VAE:
    torch.manual_seed(0)
    return first_stage(c) if stage == 1 else second_stage(c)


def plain_network(c: Config, stage: int) -> VAE:
    """The same from PyTorch's own layers, as the other contestants would have it."""
    return with_plain_layers(network(c, stage))


class PlainConv2d(nn.Conv2d):
    """PyTorch's, called as bvae's blocks call their layers."""

    def apart(self, x: Tensor) -> tuple[Tensor, None]:
        return self(x), None


class PlainConvTranspose2d(nn.ConvTranspose2d):
    def apart(self, x: Tensor) -> tuple[Tensor, None]:
        return self(x), None


class PlainNormReLU(nn.Sequential):
    def forward(self, x: Tensor, offset: None = None) -> Tensor:
        return super().forward(x)

    def beside(self, x: Tensor, offset: None = None) -> tuple[Tensor, Tensor]:
        return self(x), x


def with_plain_layers(module: Any) -> Any:
    """`module` with every layer of bvae's replaced by the one of torch.nn that computes the same."""
    for name, child in module.named_children():
        plain: nn.Module
        match child:
            case Conv3x3():
                plain = PlainConv2d(child.in_channels, child.out_channels, 3, child.stride, 1)  # type: ignore[arg-type]
            case ConvTranspose3x3():
                plain = PlainConvTranspose2d(child.in_channels, child.out_channels, 3, 2, 1, 1)
            case LinearReLU():
                dense = nn.Linear(child.in_features, child.out_features)
                dense.load_state_dict(child.state_dict())
                setattr(module, name, nn.Sequential(dense, nn.ReLU()))
                continue
            case Linear():
                plain = nn.Linear(child.in_features, child.out_features)
            case BatchNormReLU():
                norm = nn.BatchNorm2d(len(child.weight), child.eps, child.momentum)
                norm.load_state_dict(child.state_dict(), strict=False)  # ours keeps one number more
                setattr(module, name, PlainNormReLU(norm, nn.ReLU()))
                continue
            case _:
                with_plain_layers(child)
                continue
        plain.load_state_dict(child.state_dict())
        setattr(module, name, plain)
    return module


# ---- bvae -----------------------------------------------------------------------------------------------------------


def bvae(c: Config, stage: int, device: torch.device, compiled: bool | None = None) -> Run:
    model, amp = network(c, stage).to(device), has_bf16(device)
    loss = BalancedLoss(c.kl_weight if stage == 1 else 1.0, logits=stage == 1).to(device)
    batches: Batches
    if stage == 1:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batches = ImageBatches(images(c).to(device), c.batch, 0, torch.bfloat16 if amp else torch.float32, c.hflip)
    else:
        batches = LatentBatches(*(t.to(device) for t in latents(c)), c.batch, 0)
    penalised = penalised_modules(model, c.l2_on) if stage == 1 else []
    objective = VAEObjective(loss, amp, c.l2, penalised)
    step = Step(model, objective, Noise(ops.make_rng(0, device)), c.latents, amp)
    step.set_lr(c.lr)
    endless = 10**9  # as long as it takes for a trial of torch.compile to pay
    runner, FACTS["compiled"] = choose_way(batches, step, True, compiled, endless, lambda text: print(text, flush=True))
    if device.type == "cuda" and runner.why_eager is not None:
        sys.exit(f"error: {runner.why_eager}")  # what is measured would not be what bvae.train runs
    batches.begin(0)
    left = batches.steps

    def run(steps: int) -> None:
        nonlocal left
        left = run_steps(runner, batches, steps, left)

    return run


def bvae_no_compile(c: Config, stage: int, device: torch.device) -> Run:
    return bvae(c, stage, device, compiled=False)


# ---- loops people write ---------------------------------------------------------------------------------------------


def loss_parts(model: VAE, x: Tensor, stage: int) -> tuple[Tensor, Tensor]:
    """(sum of squared errors, KL), means over the batch."""
    mu, log_sigma = model.encoder(x)
    z = mu + log_sigma.exp() * torch.randn_like(mu)
    recon = model.decoder(z).float()
    if stage == 1:
        recon = torch.sigmoid(recon)
    sse = F.mse_loss(recon, x.float(), reduction="sum") / len(x)
    return sse, 0.5 * (mu**2 + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum(1).mean()


def penalty(c: Config, kernels: list[Tensor]) -> Tensor | float:
    return c.l2 * sum(w.square().sum() for w in kernels) if kernels else 0.0


class Samples(Dataset):
    """Samples as people keep them, in host memory: uint8 images scaled one by one, or a posterior drawn from."""

    def __init__(self, c: Config, stage: int) -> None:
        self.images = images(c) if stage == 1 else None
        self.latents = latents(c)

    def __len__(self) -> int:
        return len(self.latents[0])

    def __getitem__(self, i: int) -> Tensor:
        if self.images is not None:
            return self.images[i].permute(2, 0, 1).float() / 255
        mu, log_sigma = self.latents
        return mu[i] + log_sigma[i].exp() * torch.randn_like(mu[i])


def plain(c: Config, stage: int, device: torch.device) -> Run:
    model = plain_network(c, stage).to(device)
    kernels = [m.weight for m in penalised_modules(model, c.l2_on)] if stage == 1 else []
    optimizer = torch.optim.Adam(model.parameters(), lr=c.lr)
    loader = DataLoader(Samples(c, stage), c.batch, shuffle=True, drop_last=True)
    endless = (x for _ in range(10**9) for x in loader)
    gamma2 = 1.0

    def run(steps: int) -> None:
        nonlocal gamma2
        for _ in range(steps):
            x = next(endless).to(device)
            sse, kl = loss_parts(model, x, stage)
            optimizer.zero_grad()
            (sse / (2 * gamma2) + kl + penalty(c, kernels)).backward()
            optimizer.step()
            gamma2 = min(gamma2, 0.99 * gamma2 + 0.01 * sse.item() / x[0].numel())

    return run


def resident(c: Config, stage: int, device: torch.device) -> Iterator[Tensor]:
    """Endless shuffled batches of data on the device."""
    data = [t.to(device) for t in ((images(c),) if stage == 1 else latents(c))]
    while True:
        order = torch.randperm(len(data[0]), device=device)
        for index in order[: len(order) // c.batch * c.batch].split(c.batch):
            if stage == 1:
                yield data[0][index].permute(0, 3, 1, 2).float() / 255
            else:
                mu, log_sigma = (t[index] for t in data)
                yield mu + log_sigma.exp() * torch.randn_like(mu)


def eager_amp(c: Config, stage: int, device: torch.device, compiled: bool = False) -> Run:
    model = plain_network(c, stage).to(device)
    if stage == 1:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kernels = [m.weight for m in penalised_modules(model, c.l2_on)] if stage == 1 else []
    optimizer = torch.optim.Adam(model.parameters(), lr=c.lr, fused=True)
    batches = resident(c, stage, device)
    gamma2 = torch.ones((), device=device)
    amp = has_bf16(device)

    def forward(x: Tensor, gamma2: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            sse, kl = loss_parts(model, x, stage)
        return sse / (2 * gamma2) + kl + penalty(c, kernels), sse.detach()

    if compiled:
        forward = torch.compile(forward, mode="max-autotune")

    def run(steps: int) -> None:
        for _ in range(steps):
            x = next(batches)
            loss, sse = forward(x, gamma2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gamma2.copy_(torch.minimum(gamma2, 0.99 * gamma2 + 0.01 * sse / x[0].numel()))

    return run


def compile_(c: Config, stage: int, device: torch.device) -> Run:
    return eager_amp(c, stage, device, compiled=True)


# ---- pythae ---------------------------------------------------------------------------------------------------------


def pythae(c: Config, stage: int, device: torch.device) -> Run:
    """Its trainer over its VAE (a fixed balance), around the same networks; a step is one of its epochs' batches."""
    logging.disable(logging.INFO)
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    networks = plain_network(c, stage)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = networks.encoder

        def forward(self, x: Tensor) -> ModelOutput:
            mu, log_sigma = self.net(x)
            return ModelOutput(embedding=mu, log_covariance=2 * log_sigma)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = networks.decoder

        def forward(self, z: Tensor) -> ModelOutput:
            recon = self.net(z)
            return ModelOutput(reconstruction=torch.sigmoid(recon) if stage == 1 else recon)

    data = images(c).permute(0, 3, 1, 2).float() / 255 if stage == 1 else latents(c)[0]
    settings = VAEConfig(input_dim=tuple(data.shape[1:]), latent_dim=c.latents)
    with tempfile.TemporaryDirectory() as folder:
        config = BaseTrainerConfig(
            output_dir=folder,
            per_device_train_batch_size=c.batch,
            learning_rate=c.lr,
            no_cuda=device.type == "cpu",
            amp=device.type == "cuda",
        )
        labels = torch.zeros(len(data))
        trainer = BaseTrainer(
            PythaeVAE(settings, Encoder(), Decoder()), BaseDataset(data, labels), training_config=config
        )
        trainer.prepare_training()
    trainer.callback_handler.callbacks = []  # its progress bar

    def run(steps: int) -> None:
        while steps:  # its loader gives no more than there is data
            n = min(steps, len(data) // c.batch)
            trainer.train_loader = trainer.get_train_dataloader(BaseDataset(data[: n * c.batch], labels))
            trainer.train_step(1)
            steps -= n

    return run


CONTESTANTS: dict[str, Callable[[Config, int, torch.device], Run]] = {
    "bvae": bvae,
    "bvae_no_compile": bvae_no_compile,
    "plain": plain,
    "eager_amp": eager_amp,
    "compile": compile_,
    "pythae": pythae,
}


if __name__ == "__main__":
    main()
