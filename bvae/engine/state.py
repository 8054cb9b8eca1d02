"""The buffers that a step moves, kept so that a step which was not finite can be undone on the device."""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae import ops

ALIGNED = 32  # floats: the 128 bytes at whose multiples a tensor of its own would begin, as vectorised kernels assume


class Moved:
    """Everything beside parameters that a step changes: buffers of the model, of whatever modules, and other state.

    All float32 tensors among it become parts of one vector, which ranks average in one exchange. Call it once the
    model is on its device: moving the model again would part them.

    Args:
        model: its buffers move, and are averaged over ranks.
        state: further tensors, changed in place, that are the same on all ranks without that.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        self._slots = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        own = _unique(buffer for _, _, buffer in self._slots)
        others = [t for t in _unique(state.values()) if all(t is not b for b in own)]
        flat = [[t for t in group if _owns_its_memory(t)] for group in (own, others)]
        self.flat, ends = _flatten(flat, next(model.parameters()).device)
        self.statistics = self.flat[: ends[0]]
        """float32 [n]: the model's part of it, which ranks average"""
        in_flat = {id(t) for group in flat for t in group}
        self.tensors = [self.flat, *(t for t in (*own, *others) if id(t) not in in_flat)]
        """all of it, dense tensors"""
        self.kept = [torch.empty_like(t) for t in self.tensors]
        """as it was when `keep` was called, in the same order"""

    def keep(self) -> None:
        """Copies it all, for `put_back` or the end of the step."""
        ops.copy_all(self.kept, self.tensors)

    def put_back(self) -> None:
        """Makes it all what it was when `keep` was called."""
        ops.copy_all(self.tensors, self.kept)

    @torch.no_grad()
    def adopt(self) -> None:
        """Takes over buffers that a module has replaced instead of changing them in place."""
        for module, name, buffer in self._slots:
            now = module._buffers[name]
            if now is not buffer and now is not None:
                buffer.copy_(now)
                module._buffers[name] = buffer


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _owns_its_memory(t: Tensor) -> bool:
    """Whether a float32 tensor fills a storage of its own, so that it can be moved into another."""
    whole = t.untyped_storage().nbytes() == t.numel() * t.element_size()
    return t.dtype == torch.float32 and t.is_contiguous() and whole


@torch.no_grad()
def _flatten(groups: list[list[Tensor]], device: torch.device) -> tuple[Tensor, list[int]]:
    """Moves the tensors of all groups into one float32 vector; returns it, and where in it each group ends.

    Each tensor begins at a multiple of ALIGNED elements; the elements between them are zero.
    """
    pieces = [F.pad(t.reshape(-1), (0, -t.numel() % ALIGNED)) for group in groups for t in group]
    flat = torch.cat(pieces) if pieces else torch.zeros(0, device=device)
    first, ends = 0, []
    for group in groups:
        for t in group:
            # set_, not a view: views share a version counter, and autograd would take one layer's update for another's.
            t.set_(flat.untyped_storage(), first, t.shape, t.stride())
            first += -(-t.numel() // ALIGNED) * ALIGNED
        ends.append(first)
    return flat, ends
