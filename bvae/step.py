"""One optimiser step of a VAE, the same for both stages; nothing in it waits for the device."""

from types import FunctionType, MethodType

import torch
from torch import Tensor

from bvae import ops
from bvae.balance import GaussianVAELoss, Loss
from bvae.checkpoint import prefixed, under
from bvae.models.half import Copies, halved_weights
from bvae.models.norm import batch_norms, flatten_statistics
from bvae.models.vae import VAE
from bvae.world import ALONE, World

BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's


def vae_loss(
    model: VAE, loss: GaussianVAELoss, x: Tensor, target: Tensor, rng: Tensor, amp: bool, first_sample: int = 0
) -> tuple[Loss, Tensor]:
    """The loss of a batch, and the moments [4,k] of its posterior (see ops.sample_kl, also for `first_sample`)."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        mu, log_sigma = model.encoder(x)
        z, kl, moments = ops.sample_kl(mu, log_sigma, rng, first_sample=first_sample, per_latent=loss.per_latent)
        recon = model.decoder(z)
    return loss(recon, target, kl=kl, latents=mu.shape[1]), moments


def _reason(error: Exception) -> str:
    """Why torch.compile failed, in one line: that of the tool it called where its report has one."""
    lines = [line.strip() for line in str(error).partition("from user code:")[0].splitlines()]
    lines = [line for line in lines if line and not line.endswith("raised:")] or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])


class Sums:
    """What is gathered over the steps since the last reset: on the device, read only when asked."""

    NAMES = ("loss", "nll", "kl", "mse", "balance")

    def __init__(self, latents: int, device: torch.device) -> None:
        self.parts = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.moments = torch.zeros(4, latents, dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)  # good steps, steps that changed nothing
        self.trouble = torch.zeros((), dtype=torch.float64, device=device)
        """rises by 1 with a bad step, falls by 1/4 to 0 with a good one; not reset: grows where over 1 in 5 is bad"""

    def tensors(self) -> dict[str, Tensor]:
        return {"parts": self.parts, "moments": self.moments, "counts": self.counts, "trouble": self.trouble}

    def add(self, loss: Loss, moments: Tensor, good: Tensor) -> None:
        # sse/(2 gamma2 D) per image, which the computed gamma keeps near 1/2.
        balance = loss.mse / (2 * loss.gamma2)
        values = torch.stack([loss.loss.float(), loss.nll, loss.kl, loss.mse, balance])
        bad = ~good
        # masked_fill, not where: a number given to where becomes a tensor on the host, which CUDA would wait for.
        self.parts += values.masked_fill(bad, 0.0)
        self.moments += moments.masked_fill(bad, 0.0)
        self.counts += torch.stack([good, bad])
        self.trouble.add_(bad, alpha=1.25).sub_(0.25).clamp_(min=0)

    def reset(self) -> None:
        for t in (self.parts, self.moments, self.counts):
            t.zero_()


class Step:
    """Forward, backward and Adam on one batch. A step that is not finite changes nothing and is counted.

    In a world of several ranks each calls it with its part of the batch; all then hold the same state, bit for bit.

    Args:
        model: on its device, in the memory format it trains in.
        loss: on the same device; parameters of its own are trained too.
        l2: weight of the sum of squares of `l2_kernels`, added to the loss.
        world: the ranks that share a batch in equal parts; `loss` must then leave gamma2 to `follow`.
        first_sample: the place of this rank's part in the batch.
    """

    def __init__(
        self,
        model: VAE,
        loss: GaussianVAELoss,
        rng: Tensor,
        latents: int,
        amp: bool,
        l2: float,
        l2_kernels: list[Tensor],
        world: World = ALONE,
        first_sample: int = 0,
    ) -> None:
        self.world = world
        self.first_sample = first_sample
        self.model = model
        self.loss = loss
        self.rng = rng
        self.amp = amp
        self.l2 = l2
        self.l2_kernels = l2_kernels
        self.parameters = [*model.parameters(), *loss.parameters()]
        # A tensor, so that a captured step follows the schedule.
        self.lr = torch.zeros((), device=rng.device)
        self.exp_avg, self.exp_avg_sq = (
            [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters] for _ in range(2)
        )
        self.steps = torch.zeros(len(self.parameters), device=rng.device)
        self.statistics = flatten_statistics(model)
        # Ranks exchange gradients in float32, and what is penalised has a second gradient, in float32.
        penalised = {id(w) for w in l2_kernels}
        halved = halved_weights(model) if amp and world.size == 1 else []
        self.copies = Copies([p for p in halved if id(p) not in penalised])
        self.objective = self._objective
        self.sums = Sums(latents, rng.device)

    def set_lr(self, lr: float) -> None:
        self.lr.fill_(lr)

    def __call__(self, x: Tensor, target: Tensor) -> None:
        before = [(t, t.clone()) for t in (self.statistics, *self.loss.state().values())]
        total, loss, moments = self._gradients(x, target)
        if self.world.size > 1:
            loss, total, moments = self._exchange(loss, total, moments)

        # What is not finite undoes the whole step, on the device.
        halves = [self.copies.of.get(p) for p in self.parameters]
        gradients = [p.grad if half is None else half.grad for p, half in zip(self.parameters, halves, strict=True)]
        good = ops.all_finite([total, *(gradient for gradient in gradients if gradient is not None)])
        ops.adam(
            self.parameters, gradients, self.exp_avg, self.exp_avg_sq, halves, self.steps, good, self.lr,
            betas=BETAS, eps=EPS,
        )  # fmt: skip
        for tensor, value in before:
            tensor.copy_(torch.where(good, tensor, value))
        self.sums.add(loss, moments, good)

    def _objective(self, x: Tensor, target: Tensor) -> tuple[Tensor, Loss, Tensor]:
        """What is minimised, with its gradient; the loss in it and the posterior's moments."""
        loss, moments = vae_loss(self.model, self.loss, x, target, self.rng, self.amp, self.first_sample)
        total = loss.loss
        if self.l2_kernels:
            total = total + self.l2 * torch.stack([w.square().sum() for w in self.l2_kernels]).sum()
        return total, Loss(loss.loss.detach(), *loss[1:]), moments

    def _gradients(self, x: Tensor, target: Tensor) -> tuple[Tensor, Loss, Tensor]:
        with self.copies:
            total, loss, moments = self.objective(x, target)
        self.zero_grad()
        total.backward()
        return total.detach(), loss, moments

    def compile(self, x: Tensor, target: Tensor) -> str | None:
        """Lets torch.compile make the forward and backward pass of the steps to come, on batches like this one.

        To be called in training mode. It runs both on the batch: the caller puts back what they move. Returns None, or
        in one line why it cannot be done; the step then stays what it was.
        """
        if any(norm.gather is not None for norm in batch_norms(self.model)):
            return "--sync-bn, which exchanges statistics in the middle of a pass"
        # With a code object of its own: what is compiled is kept with that, and a process may have so many variants.
        own = FunctionType(Step._objective.__code__.replace(), globals())
        self.objective = torch.compile(MethodType(own, self), fullgraph=True, dynamic=False)
        try:
            self._gradients(x, target)
        except Exception as error:  # of any of its many tools; what is not theirs the step itself will raise again
            self.objective = self._objective
            return _reason(error)
        return None

    def zero_grad(self) -> None:
        for p in (*self.parameters, *self.copies.of.values()):
            p.grad = None

    def _exchange(self, loss: Loss, total: Tensor, moments: Tensor) -> tuple[Loss, Tensor, Tensor]:
        """Makes gradients, statistics and gamma2 those of the whole batch, in one all-reduce; returns its figures.

        What is not finite on one rank is so in the mean, on all of them: they agree on the step that is undone.
        """
        parts = torch.stack([loss.loss, loss.nll, loss.kl, loss.mse, total])
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        *gradients, statistics, parts, moments = self.world.means([*gradients, self.statistics, parts, moments])
        for p, gradient in zip((p for p in self.parameters if p.grad is not None), gradients, strict=True):
            p.grad = gradient
        self.statistics.copy_(statistics)
        whole, nll, kl, mse, total = parts.unbind()
        self.loss.follow(mse, kl)
        pooled = loss._replace(loss=whole, nll=nll, kl=kl, mse=mse)
        return pooled, total, moments * self.world.size

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes and the next one reads; some may share memory."""
        return [*self.model.parameters(), *self.model.buffers(), *self.loss.parameters(), *self.tensors().values()]

    def tensors(self) -> dict[str, Tensor]:
        """The state beside the model: optimiser, loss, noise and sums; fixed names, whatever the step."""
        state = {"rng": self.rng, **prefixed(self.sums.tensors(), "sums"), **prefixed(self.loss.state_dict(), "loss")}
        for i in range(len(self.parameters)):
            state |= prefixed(self._adam(i), f"adam.{i}")
        return state

    def _adam(self, i: int) -> dict[str, Tensor]:
        """Adam's state of parameter i."""
        return {"step": self.steps[i], "exp_avg": self.exp_avg[i], "exp_avg_sq": self.exp_avg_sq[i]}

    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """Takes over what tensors() gave. Raises KeyError or RuntimeError where it does not fit."""
        self.rng.copy_(state["rng"])
        self.loss.load_state_dict(under(state, "loss"))
        for name, t in self.sums.tensors().items():
            t.copy_(state[f"sums.{name}"])
        for i, p in enumerate(self.parameters):
            saved = under(state, f"adam.{i}")
            for name, t in self._adam(i).items():
                if not saved:  # a state from before the first step may have none
                    t.zero_()
                elif saved[name].shape != t.shape:
                    raise RuntimeError(f"the moments of parameter {i} are not of its shape {list(p.shape)}")
                else:
                    t.copy_(saved[name])
