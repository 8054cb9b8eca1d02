"""The stages that a configuration asks for, each made when its turn comes: the second needs the first one's end."""

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from bvae import ops
from bvae.balance import GaussianVAELoss
from bvae.batches.mapped import Images, is_mapped, resident
from bvae.batches.resident import Batches, LatentBatches
from bvae.batches.streamed import image_batches, place
from bvae.config import Config
from bvae.config.registry import Part, balances, families, networks
from bvae.data import Dataset
from bvae.errors import UserError
from bvae.metrics.fid_scores import fid_scorer
from bvae.metrics.scores import encode_images
from bvae.models.norm import batch_norms
from bvae.models.posterior import Posterior
from bvae.models.vae import latents_of, penalised_modules
from bvae.seeds import derive
from bvae.stages.base import Schedule, Stage
from bvae.stages.images import ImageStage
from bvae.stages.latents import LatentStage
from bvae.stages.objective import Ingredients, Noise, VAEObjective
from bvae.two_stage import TwoStageVAE
from bvae.world import World, gather


def check_data(config: Config, data: Dataset, world: World) -> None:
    """Raises UserError where the configuration cannot be trained on these images by these processes."""
    batch, ranks = config.batch, world.size
    if batch % ranks:
        raise UserError(f"--batch {batch} is that of a whole step: {ranks} processes cannot take equal parts")
    if ranks > 1 and not config.sync_bn and config.network in networks:
        try:
            networks[config.network].check(dataclasses.replace(config, batch=batch // ranks))
        except UserError as error:
            raise UserError(f"--batch {batch} is {batch // ranks} a process: {error}") from None
    if world.from_first(data.digest) != data.digest:
        raise UserError(f"{data.name}: rank {world.rank} does not have the data that rank 0 has")
    if len(data.train) < batch:
        held_out = f" beside the {config.val} held out" if config.val else ""
        raise UserError(
            f"{data.name}: {len(data.train)} training images{held_out} are fewer than one batch of {batch}: "
            "lower --batch"
        )


class Stages:
    """The stages of a run, by their place in it, from 1.

    Args:
        config: validated. data: checked.
        model: on its device; its networks are trained.
        amp: networks run in bf16.
    """

    def __init__(self, config: Config, data: Dataset, model: TwoStageVAE, amp: bool, world: World) -> None:
        self.config = config
        self.data = data
        self.model = model
        self.amp = amp
        self.world = world
        self.device = world.device
        self.count = 2 if config.epochs2 else 1
        self.part = world.share(config.batch)
        k = latents_of(model.stage1, config)
        if k != config.latents:
            raise UserError(f"--latents is {config.latents}, the network's encoder gives {k}")
        if config.sync_bn and world.size > 1:
            synchronise(model, self.device)
        self.train_images = place(data.train, self.device, config.stream)
        # Held out from a file of training images, the test set is in memory.
        self.test_images = self._small(data.test)
        self.val_images = None if data.val is None else self._small(data.val)
        scored = self.test_images[: config.fid_num]
        self.scorer = fid_scorer(config, resident(scored), world) if config.fid_every else None

    def _small(self, images: np.ndarray) -> Images:
        return place(images, self.device, self.config.stream if is_mapped(images) else "never")

    def make(self, number: int) -> Stage:
        """The stage with that number, ready to be trained from its start."""
        return self._images() if number == 1 else self._latents()

    def _images(self) -> Stage:
        c, model = self.config, self.model.stage1
        seed, dtype = derive(c.seed, "batches", 1), torch.bfloat16 if self.amp else torch.float32
        batches = image_batches(self.train_images, c.batch, seed, dtype, c.hflip, self.part)
        schedule = self._schedule(c.epochs, c.lr, c.lr_halve, batches, c.plateau)

        def balance() -> GaussianVAELoss:
            return self._loss(balances[c.balance], c.resolved_kl_weight(), True, schedule)

        given = Ingredients(c, model, balance, self.amp, penalised_modules(model, c.l2_on), self.world)
        return ImageStage(
            c, self.model, families[c.family].build(given), batches, schedule, self._noise(1),
            self.data, self.test_images, self.val_images, self.amp, self.scorer, self.world,
        )  # fmt: skip

    def _latents(self) -> Stage:
        c = self.config
        self.model.stage1.requires_grad_(False)
        posterior, test = (self._encode(images) for images in (self.train_images, self.test_images))
        val = None if self.val_images is None else self._encode(self.val_images)
        batches = LatentBatches(*posterior, c.batch, derive(c.seed, "batches", 2), self.part)
        schedule = self._schedule(c.epochs2, c.lr2, c.lr_halve2, batches)
        balance = balances[c.balance]
        # A rule with a target in the images' units says nothing about latents.
        loss = self._loss(balances["computed"] if balance.images_only else balance, 1.0, False, schedule)
        return LatentStage(
            c, self.model, VAEObjective(loss, self.amp), batches, schedule, self._noise(2),
            posterior, test, val, self.scorer, self.world,
        )  # fmt: skip

    def _encode(self, images: Images) -> Posterior:
        return encode_images(self.model.stage1, images, self.world)

    def _loss(self, balance: Part, kl_weight: float, logits: bool, schedule: Schedule) -> GaussianVAELoss:
        # With several ranks the step moves the balance, from the means over all of them.
        ranks = self.world.size > 1
        loss: GaussianVAELoss = balance.build(
            self.config, kl_weight=kl_weight, logits=logits, total_steps=schedule.steps, manual=ranks
        )
        if ranks:
            loss.pool = lambda figures: self.world.mean_(figures.clone())
        return loss.to(self.device)

    def _noise(self, number: int) -> Noise:
        rng: Tensor = ops.make_rng(derive(self.config.seed, "noise", number), self.device)
        return Noise(rng, self.part.start)

    def _schedule(self, epochs: int, lr: float, lr_halve: int, batches: Batches, plateau: int = 0) -> Schedule:
        steps = epochs * batches.steps
        return Schedule(epochs, lr, lr_halve, min(steps, self.config.max_steps or steps), plateau)


def synchronise(model: TwoStageVAE, device: torch.device) -> None:
    """Lets every batch norm normalise over all ranks' samples. Raises UserError for those that cannot."""
    for norm in batch_norms(model):
        norm.gather = gather
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        if device.type != "cuda":
            raise UserError("--sync-bn: torch's batch norms, which the network has, are synchronised on CUDA only")
        model.stage1 = nn.SyncBatchNorm.convert_sync_batchnorm(model.stage1)
