"""One optimiser step, the same for every stage and objective; nothing in it waits for the device."""

from collections.abc import Callable, Sequence
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from bvae import ops
from bvae.engine.state import Moved
from bvae.models.half import Copies, halved_weights
from bvae.models.norm import batch_norms
from bvae.run.checkpoint import prefixed, under
from bvae.stages.objective import Noise, Objective
from bvae.world import ALONE, World

BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's


def _reason(error: Exception) -> str:
    """Why torch.compile failed, in one line: that of the tool it called where its report has one."""
    lines = [line.strip() for line in str(error).partition("from user code:")[0].splitlines()]
    lines = [line for line in lines if line and not line.endswith("raised:")] or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])


class Sums:
    """Sums over the steps since the last reset: on the device, read only when asked.

    Args:
        parts: names of the figures that the objective reports.
        latents: k of the posterior's moments [4,k]; 0 where there is no posterior.
    """

    def __init__(self, parts: Sequence[str], latents: int, device: torch.device) -> None:
        self.names = tuple(parts)
        self.parts = torch.zeros(len(parts), dtype=torch.float64, device=device)
        self.moments = torch.zeros(4, latents, dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)  # good steps, steps that changed nothing
        self.bad_step_score = torch.zeros((), dtype=torch.float64, device=device)
        """+1 per non-finite step, -1/4 per good one, not below 0; grows only if more than one step in five is bad"""

    def tensors(self) -> dict[str, Tensor]:
        return {"parts": self.parts, "moments": self.moments, "counts": self.counts, "trouble": self.bad_step_score}

    def reset(self) -> None:
        for t in (self.parts, self.moments, self.counts):
            t.zero_()


class Step:
    """Forward, backward and Adam on one batch. A step that is not finite changes nothing and is counted.

    In a world of several ranks each calls it with its part of the batch; all then hold the same state, bit for bit.

    Args:
        model: on its device, in the memory format it trains in.
        objective: on the same device.
        noise: see Noise; `first_sample` is the place of this rank's part in the batch.
        latents: k of the objective's moments; 0 where it gives none.
        amp: the objective runs the model in bf16: layers that can keep bf16 copies of their weights.
        world: the ranks that share a batch in equal parts.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, noise: Noise, latents: int, amp: bool, world: World = ALONE
    ) -> None:
        self.world = world
        self.model = model
        self.objective = objective
        self.noise = noise
        named = dict(model.named_parameters())
        named |= {f"objective.{name}": p for name, p in objective.named_parameters()}
        self.names, self.parameters = list(named), list(named.values())
        device = noise.rng.device
        # A tensor, so that a captured step follows the schedule.
        self.lr = torch.zeros((), device=device)
        self.exp_avg, self.exp_avg_sq = (
            [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.parameters] for _ in range(2)
        )
        self.steps = torch.zeros(len(self.parameters), device=device)
        self.moved = Moved(model, objective.state())
        # Ranks exchange gradients in float32, and what is penalised has a second gradient, in float32.
        penalised = {id(m.weight) for m in getattr(objective, "penalised", ())}
        copied = halved_weights(model) if amp and world.size == 1 else []
        self.copies = Copies([p for p in copied if id(p) not in penalised])
        self.minimise: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = objective
        self.sums = Sums(objective.parts, latents, device)

    def set_lr(self, lr: float) -> None:
        self.lr.fill_(lr)

    def __call__(self, x: Tensor, target: Tensor) -> None:
        self.moved.keep()
        total, parts, moments = self._gradients(x, target)
        self.moved.adopt()
        if self.world.size > 1:
            total, parts, moments = self._exchange(total, parts, moments)

        # A value that is not finite undoes the whole step, on the device.
        copies = [self.copies.of.get(p) for p in self.parameters]
        gradients = [p.grad if copy is None else copy.grad for p, copy in zip(self.parameters, copies, strict=True)]
        good = ops.all_finite([total, *(gradient for gradient in gradients if gradient is not None)])
        ops.adam(
            self.parameters, gradients, self.exp_avg, self.exp_avg_sq, copies, self.steps, good, self.lr,
            betas=BETAS, eps=EPS,
        )  # fmt: skip
        sums = self.sums
        ops.end_step(
            good, parts, moments, sums.parts, sums.moments, sums.counts, sums.bad_step_score,
            self.moved.tensors, self.moved.kept,
        )  # fmt: skip

    def _gradients(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        with self.copies:
            total, parts, moments = self.minimise(self.model, x, target, self.noise)
        self.zero_grad()
        total.backward()
        return total.detach(), parts, moments

    def compile(self, x: Tensor, target: Tensor) -> str | None:
        """Lets torch.compile make the forward and backward pass of the steps to come, on batches like this one.

        Call it in training mode. It runs both on the batch: the caller puts back what they move. Returns None, or
        in one line why it cannot be done; the step then stays what it was.
        """
        if any(norm.gather is not None for norm in batch_norms(self.model)):
            return "--sync-bn, which exchanges statistics in the middle of a pass"
        if getattr(self.objective, "gathers", False):
            return "the family's MMD, which brings the codes of all processes together in the middle of a pass"
        # A code object of its own: Dynamo keeps its results with that, and limits how many variants it keeps.
        call = type(self.objective).__call__
        own = FunctionType(
            call.__code__.replace(), call.__globals__, call.__name__, call.__defaults__, call.__closure__
        )
        self.minimise = torch.compile(MethodType(own, self.objective), fullgraph=True, dynamic=False)
        try:
            self._gradients(x, target)
        except Exception as error:  # any of its many tools may raise; the step itself raises an error of ours again
            self.minimise = self.objective
            return _reason(error)
        return None

    def zero_grad(self) -> None:
        for p in (*self.parameters, *self.copies.of.values()):
            p.grad = None

    def _exchange(self, total: Tensor, parts: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Makes gradients, statistics and the objective's state those of the whole batch, in one all-reduce.

        Returns total, parts and moments of the whole batch. A value that is not finite on one rank is so in the mean,
        on all of them: they agree on the step that is undone.
        """
        with_gradient = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in with_gradient if p.grad is not None]
        figures = torch.cat([parts, total.float().view(1)])
        extra = [] if moments is None else [moments]
        *means, statistics, figures, rest = self.world.means(
            [*gradients, self.moved.statistics, figures, *(extra or [figures.new_zeros(0)])]
        )
        for p, gradient in zip(with_gradient, means, strict=True):
            p.grad = gradient
        self.moved.statistics.copy_(statistics)
        parts, total = figures[:-1], figures[-1]
        self.objective.pooled(parts)
        return total, parts, None if moments is None else rest * self.world.size

    def state(self) -> list[Tensor]:
        """Every tensor that a step changes and the next one reads; some may share memory."""
        return [*self.parameters, *self.model.buffers(), *self.tensors().values()]

    def tensors(self) -> dict[str, Tensor]:
        """The state beside the model: optimiser, objective, noise and sums; fixed names, whatever the step."""
        state = {"rng": self.noise.rng, **prefixed(self.sums.tensors(), "sums")}
        state |= prefixed({**self.objective.state(), **dict(self.objective.named_parameters())}, "loss")
        for i, name in enumerate(self.names):
            state |= prefixed(self._adam(i), f"adam.{name}")
        return state

    def _adam(self, i: int) -> dict[str, Tensor]:
        """Adam's state of parameter i."""
        return {"step": self.steps[i], "exp_avg": self.exp_avg[i], "exp_avg_sq": self.exp_avg_sq[i]}

    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """Takes over what tensors() gave. Raises KeyError or RuntimeError where it does not fit.

        Runs of before kept Adam's state by the parameters' numbers instead of their names.
        """
        own = self.tensors()
        by_number = any(name.startswith("adam.0.") for name in state)
        for i, name in enumerate(self.names):
            saved = under(state, f"adam.{i if by_number else name}")
            for key, t in self._adam(i).items():
                del own[f"adam.{name}.{key}"]
                if not saved:  # a state from before the first step may have none
                    t.zero_()
                elif saved[key].shape != t.shape:
                    raise RuntimeError(f"the moments of parameter {name} are not of its shape {list(t.shape)}")
                else:
                    t.copy_(saved[key])
        with torch.no_grad():
            for name, t in own.items():
                if state[name].shape != t.shape:
                    raise RuntimeError(f"{name} is {list(state[name].shape)}, not {list(t.shape)}")
                t.copy_(state[name])
