#!/usr/bin/env python3
"""Counts what a GPU would be given to do, without one: nodes of a step's CUDA graph and launches at an epoch's end.

    python benchmarks/count_launches.py [--json PATH]

Steps of `cifar10` at batch 100 in bf16 run on tensors without data, arranged as on CUDA, and each operation that
PyTorch dispatches counts as the kernels and memsets that it is there: a convolution one, its backward one a gradient,
a view none, bvae's own as csrc launches them. NOT counted is what an operation adds on the device: a composite one of
several kernels, a reduction or a product that is split in two, a conversion between layouts around a convolution. Steps
that torch.compile makes are not counted ("compiled" is null): Inductor's kernels are known only where there are a
PyTorch with CUDA and Triton. At an epoch's end, but for the first of a run, each replay of a recorded graph counts as
one launch.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import re
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bvae import ops
from bvae.balance import BalancedLoss
from bvae.batches.resident import ImageBatches, LatentBatches
from bvae.config import Config, find_preset
from bvae.engine import graph
from bvae.engine.state import Moved
from bvae.engine.step import Step
from bvae.models import conv, half
from bvae.models.vae import VAE, first_stage, second_stage
from bvae.stages.base import Schedule
from bvae.stages.images import ImageStage
from bvae.stages.objective import Noise, VAEObjective
from bvae.two_stage import TwoStageVAE
from bvae.world import ALONE

CSRC = Path(__file__).parents[1] / "csrc"
RECIPE = "cifar10"
IMAGES = 1_000  # of the data set without data

Parts = collections.Counter[str]

CONVOLUTIONS = "convolutions"
NORMS = "batch norm + ReLU"
BIASES = "bias additions"
BIAS_GRADIENTS = "bias gradients"
ADDITIONS = "residual and gradient additions"
ENDS = "ends of residual blocks"
DENSE = "dense layers and heads"
CASTS = "casts and copies"
LOSS = "batch, sampling, loss"
ADAM = "finite check and Adam"
BOOKS = "state kept, sums, undo"
REST = "the rest"


def per_launch(file: str, name: str) -> int:
    """A constant of csrc: how many tensors a launch takes."""
    found = re.search(rf"\b{name} = (\d+)", (CSRC / file).read_text())
    assert found is not None, f"{file} has no {name}"
    return int(found[1])


def launches(tensors: int, file: str, name: str) -> int:
    return -(-tensors // per_launch(file, name))


# bvae's own operations: their part, and nodes from the arguments. Sampling and the loss have a memset of
# their counters before the kernel.
OURS: dict[str, tuple[str, Callable[..., int]]] = {
    "sample_kl": (LOSS, lambda *args: 2),
    "sample_kl_backward": (LOSS, lambda *args: 1),
    "philox_normal": (LOSS, lambda *args: 1),
    "balanced_loss": (LOSS, lambda *args: 2),
    "balanced_loss_backward": (LOSS, lambda *args: 1),
    "update_gamma2": (LOSS, lambda *args: 1),
    "gather": (LOSS, lambda *args: 1),
    "batch_norm_relu": (NORMS, lambda *args: 2),
    "batch_norm_relu_backward": (NORMS, lambda *args: 2),
    "add_biased": (ENDS, lambda *args: 1),
    "channel_sums": (BIAS_GRADIENTS, lambda *args: 1),
    "relu_grad": (DENSE, lambda *args: 1),
    "all_finite": (ADAM, lambda tensors: 1 + launches(len(tensors), "adam.cu", "kFiniteTensors")),
    "adam": (ADAM, lambda parameters, grads, *args: 1 + launches(
        sum(g is not None for g in grads), "adam.cu", "kAdamTensors")),
    "copy_all": (BOOKS, lambda to, source: launches(len(to), "step.cu", "kCopies")),
    "end_step": (BOOKS, lambda *args: max(1, launches(len(args[7]), "step.cu", "kCopies"))),
}  # fmt: skip

PARTS = {
    "addmm": DENSE, "_addmm_activation": DENSE, "mm": DENSE, "relu": DENSE, "threshold_backward": DENSE, "cat": DENSE,
    "mean": DENSE, "div": DENSE, "sum": BIAS_GRADIENTS, "add": ADDITIONS, "_to_copy": CASTS, "clone": CASTS,
    "copy_": CASTS, "_foreach_copy_": CASTS, "index_select": LOSS, "stack": BOOKS, "native_batch_norm": NORMS,
    "_native_batch_norm_legit_no_training": NORMS, "_batch_norm_no_update": NORMS,
}  # fmt: skip
NOTHING = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "device",
    "promote_types",
}


class Launches(TorchDispatchMode):
    """Counts the operations dispatched inside, by part."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: Parts = collections.Counter()
        self.unknown: Parts = collections.Counter()  # operations that are counted as one node of the rest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "bvae":
            part, count = OURS[name]
            self.parts[part] += count(*args)
        elif name == "convolution":
            self.parts[CONVOLUTIONS] += 1
            self.parts[BIASES] += args[2] is not None
        elif name == "convolution_backward":
            x, weight, bias = args[-1]
            self.parts[CONVOLUTIONS] += x + weight
            self.parts[BIAS_GRADIENTS] += bias
        elif name not in NOTHING and not is_view(func):
            self.parts[PARTS.get(name, REST)] += 1
            self.unknown[name] += name not in PARTS
        return func(*args, **(kwargs or {}))


def is_view(func: Any) -> bool:
    """Whether an operation gives its argument's memory in another shape, for which a GPU does nothing."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """The layers, and the recordings, of a GPU."""
    with contextlib.ExitStack() as stack:
        for module in (conv, half, graph):
            stack.enter_context(unittest.mock.patch.object(module, "on_cuda", lambda device: True))
        stack.enter_context(unittest.mock.patch.object(conv, "SLOW_STRIDES", ()))
        yield


def network(c: Config, stage: int) -> VAE:
    model = first_stage(c) if stage == 1 else second_stage(c)
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model


def count_step(c: Config, stage: int) -> Parts:
    """Nodes of a step by part."""
    with as_on_cuda(), FakeTensorMode(allow_non_fake_inputs=True):
        model = network(c, stage)
        batches: ImageBatches | LatentBatches
        if stage == 1:
            images = torch.zeros(IMAGES, c.height, c.width, c.channels, dtype=torch.uint8)
            batches = ImageBatches(images, c.batch, 0, torch.bfloat16, c.hflip)
        else:
            batches = LatentBatches(*(torch.zeros(IMAGES, c.latents) for _ in range(2)), c.batch, 0)
        objective = VAEObjective(BalancedLoss(1.0, logits=stage == 1), amp=True)
        step = Step(model, objective, Noise(ops.make_rng(0)), c.latents, amp=True)
        batches.begin(0)
        step(*batches.draw())
        with Launches() as counted:
            step(*batches.draw())
    return counted.parts


class Replayed:
    """Recordings, each replay of which is one launch."""

    def __init__(self, counted: Launches) -> None:
        self.counted = counted

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Callable[[Callable[[], None]], Callable[[], None]]]:
        yield self.record

    def record(self, program: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            before = self.counted.parts.copy()
            program()
            self.counted.parts = before
            self.counted.parts["replays"] += 1

        return replay


def count_epoch_end(c: Config) -> Parts:
    """Launches at the end of an epoch of stage 1 that is scored, but for those of the first.

    On data, for scores are read by the host; the network is a narrow one, which launches as many.
    """
    c = dataclasses.replace(c, base=2, fc=4, batch=10)
    generator = torch.Generator().manual_seed(0)
    size = (c.eval_images, c.height, c.width, c.channels)
    images = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    with as_on_cuda():
        model = TwoStageVAE(c)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        objective = VAEObjective(BalancedLoss(1.0, logits=True), amp=True)
        noise, batches = Noise(ops.make_rng(0)), ImageBatches(images, c.batch, 0, torch.bfloat16)
        moved = Moved(model.stage1, objective.state())
        counted = Launches()
        with unittest.mock.patch.object(graph, "_recording", Replayed(counted)):
            data: Any = None  # of which scores need nothing
            schedule = Schedule(c.epochs, c.lr, c.lr_halve, 1)
            stage = ImageStage(
                c, model, objective, batches, schedule, noise, data, images, None, True, None, ALONE
            )  # fmt: skip
            for _ in range(2):
                counted.parts.clear()
                with counted:
                    moved.keep()
                    stage.prepare_scores()
                    stage.score()
                    moved.put_back()
    return counted.parts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    c = find_preset(RECIPE)
    report: dict[str, Any] = {}
    for stage in (1, 2):
        parts = count_step(c, stage)
        report[f"stage{stage}"] = {"plain": parts.total(), "compiled": None, "parts": dict(parts.most_common())}
    parts = count_epoch_end(c)
    report["epoch_end"] = {"plain": parts.total(), "parts": dict(parts.most_common())}
    for name, counted in report.items():
        print(f"{name}: {counted['plain']} {'launches' if name == 'epoch_end' else 'nodes'}")
        for part, nodes in counted["parts"].items():
            print(f"  {nodes:5}  {part}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
