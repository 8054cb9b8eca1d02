"""REC, GEN-1 and GEN-2: the FIDs of what a model reconstructs and generates, from tensors, against real images.

Under torchrun the ranks share the images: noise belongs to an image's place in the whole, so that each draws the same.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bvae import ops
from bvae.config import Config
from bvae.errors import UserError
from bvae.metrics.cache import Cache, default_folder
from bvae.metrics.extract import Extractor
from bvae.metrics.measure import measure
from bvae.metrics.protocols import PROTOCOLS
from bvae.metrics.scores import encode_images
from bvae.metrics.sources import ArrayImages
from bvae.metrics.statistics import Statistics, check_enough, fid
from bvae.metrics.weights import HELP, find_weights, load_inception
from bvae.seeds import derive
from bvae.two_stage import TwoStageVAE
from bvae.world import ALONE, World

CHUNK = 500  # images in memory at a time
NUM = 10_000  # the paper's number of generated images

Progress = Callable[[str, int, int], None]  # name of the measurement, images done, images in all


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody follows."""


class FIDScorer:
    """Scores a model against real images, whose statistics are measured once, or taken from the cache.

    Args:
        extractor: the network under its protocol.
        images: uint8 [N,H,W,C], resident; the reference, and what is reconstructed.
        num: number of generated images; at most the first `num` images of the reference are used.
        allow_few: score fewer than 2,048 images too; the label then says so.
        cache: of the reference's statistics; by default none.

    Raises UserError where there are too few images.
    """

    def __init__(
        self,
        extractor: Extractor,
        images: Tensor,
        num: int = NUM,
        allow_few: bool = False,
        cache: Cache | None = None,
        world: World = ALONE,
        progress: Progress = silent,
    ) -> None:
        self.extractor = extractor
        self.images = images[:num]
        self.num = num
        self.world = world
        self.progress = progress
        labels = [
            check_enough(len(self.images), "the test set", allow_few),
            check_enough(num, "generated images", allow_few),
        ]
        self.label = next((label for label in labels if label), None)
        reference = ArrayImages(self.images.cpu().numpy(), "the test set", grey=True)
        self.reference = measure(
            reference,
            extractor,
            cache or Cache(None),
            progress=self._counter("reference", len(self.images)),
            rank=world.rank,
            ranks=world.size,
        )

    def about(self) -> dict[str, Any]:
        """Facts that go with its figures: counts, precision, weights, label."""
        origin = self.reference.origin
        return {
            "n": self.num,
            "n_reference": len(self.images),
            "precision": origin.precision,
            "weights": origin.weights,
            "label": self.label,
        }

    def reconstructed(self, model: TwoStageVAE, seed: int, sample: bool = True, contrast: bool = False) -> float:
        """REC: of the reference's images through the model, with z sampled or, without `sample`, at its mean.

        `contrast` is what the authors' script does first: see restore_contrast. Not for several processes.
        """
        posterior = encode_images(model.stage1, self.images, self.world)
        z = posterior.mu
        if sample:
            z = posterior.draw(ops.make_rng(derive(seed, "reconstruct"), z.device))

        def images() -> Iterator[Tensor]:
            return self._decoded(model, z)

        what = "REC" if sample else "REC (mean)"
        if contrast:
            return self._score(what, restore_contrast(images, self.images), len(z))
        return self._score(what, images(), len(z))

    def generated(self, model: TwoStageVAE, stage: int, seed: int, rescale: bool | None = None) -> float:
        """GEN-1 or GEN-2; `rescale` overrides the recipe's choice of rescaling the latents."""
        z = model.sample_latents(self.num, stage, seed, rescale)
        return self.of_latents(model, z, f"GEN-{stage}" + " (rescaled)" * bool(rescale))

    def of_latents(self, model: TwoStageVAE, z: Tensor, what: str) -> float:
        """FID of the images that latents z [n,k] decode to; `what` names them in the progress."""
        return self._score(what, self._decoded(model, z), len(z))

    def curve(self, model: TwoStageVAE, stage: int, seed: int) -> dict[str, Any]:
        """The scores that an epoch of that stage adds to its line in metrics.jsonl. Latents are not rescaled."""
        if stage == 1:
            found = {"fid_rec": self.reconstructed(model, seed), "fid_gen1": self.generated(model, 1, seed, False)}
        else:
            found = {"fid_gen2": self.generated(model, 2, seed, False)}
        return {**found, "fid_protocol": self.extractor.protocol.name, "fid_n": self.num}

    def _decoded(self, model: TwoStageVAE, z: Tensor) -> Iterator[Tensor]:
        for part in z.split(CHUNK)[self.world.rank :: self.world.size]:
            yield model.decode(part)

    def _score(self, what: str, images: Iterable[Tensor], total: int) -> float:
        statistics: Statistics = self.extractor.statistics(images, progress=self._counter(what, total))
        return fid(self.reference, statistics)

    def _counter(self, what: str, total: int) -> Callable[[int], None]:
        done = 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            self.progress(what, done, total)

        return count


def fid_scorer(config: Config, images: Tensor, world: World) -> FIDScorer:
    """The scorer that a run's configuration asks for. Raises UserError where the weights are missing."""
    weights = find_weights(config.inception)
    if weights is None:
        raise UserError(f"--fid-every: the weights of the FID network are missing: {HELP}")
    network, digest = load_inception(weights, images.device)
    extractor = Extractor(network, digest, PROTOCOLS[config.fid_protocol])
    return FIDScorer(extractor, images, config.fid_num, config.allow_few, Cache(default_folder()), world)


def read_fid(results: Path) -> dict[str, Any]:
    """{"fid": ...} of a run's results.json, or nothing where it holds none."""
    try:
        found = json.loads(results.read_text())
    except (OSError, ValueError):
        return {}
    return {"fid": found["fid"]} if isinstance(found, dict) and "fid" in found else {}


def restore_contrast(images: Callable[[], Iterator[Tensor]], data: Tensor) -> Iterator[Tensor]:
    """Images about their mean image, their mean pixel deviation brought to that of the data, clipped to [0,1].

    As the authors' script treats reconstructions, which are blurred and so of less contrast, before REC.

    Args:
        images: gives the same float images [B,C,H,W] each time it is called.
        data: uint8 [N,H,W,C].
    """
    mean, deviation = _pixel_moments(images())
    _, wanted = _pixel_moments(part.permute(0, 3, 1, 2).double() / 255 for part in data.split(CHUNK))
    factor = (wanted.mean() / deviation.mean()).float()
    mean = mean.float()
    for part in images():
        yield (mean + (part - mean) * factor).clamp(0, 1)


def _pixel_moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) over images of each pixel, [C,H,W] float64."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        part = part.double()
        count += len(part)
        total = total.to(part) + part.sum(0)
        squares = squares.to(part) + part.square().sum(0)
    mean = total / count
    return mean, (squares / count - mean**2).clamp(min=0).sqrt()
