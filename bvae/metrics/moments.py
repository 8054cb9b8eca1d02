"""Mean and covariance of features as they stream by, in float64 on their device, whatever the batches."""

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK = 256  # rows that are added at a time: the same rows give the same bits however they were batched


class Moments:
    """Streaming mean and centred second moment of rows of `dim` features.

    Rows are buffered into blocks of a fixed size, each of which joins the total by Chan, Golub & LeVeque's update
    (1979), which does not lose digits to cancellation.

    Attributes:
        n: rows so far.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self._count = 0  # rows in mean and scatter
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._pending: list[Tensor] = []  # fewer than BLOCK rows

    @property
    def n(self) -> int:
        return self._count + sum(map(len, self._pending))

    @property
    def dim(self) -> int:
        return len(self._mean)

    def add(self, features: Tensor) -> None:
        """Adds rows [B,dim]."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be [B,{self.dim}], not {list(features.shape)}")
        self._pending.append(features.to(self._mean.device))
        rows = sum(map(len, self._pending))
        if rows < BLOCK:
            return
        *blocks, rest = torch.cat(self._pending).split([BLOCK] * (rows // BLOCK) + [rows % BLOCK])
        for block in blocks:
            self._join(*_moments(block))
        self._pending = [rest.clone()] if len(rest) else []

    def merge(self, other: "Moments") -> None:
        """Adds the rows that `other` has seen."""
        self._flush()
        other._flush()
        self._join(other._count, other._mean.to(self._mean.device), other._scatter.to(self._mean.device))

    def all_reduce(self) -> None:
        """Adds what every other rank of the default process group has seen; afterwards all hold the same."""
        self._flush()
        count = torch.tensor([float(self._count)], dtype=torch.float64, device=self._mean.device)
        mean = self._mean * count
        dist.all_reduce(count)
        dist.all_reduce(mean)
        mean /= count.clamp(min=1)
        gap = self._mean - mean
        self._scatter.addr_(gap, gap, alpha=self._count)
        dist.all_reduce(self._scatter)
        self._mean, self._count = mean, int(count.item())

    def mean(self) -> Tensor:
        """[dim] float64."""
        self._flush()
        return self._mean.clone()

    def covariance(self) -> Tensor:
        """[dim,dim] float64, unbiased (divided by n-1), as NumPy's cov and pytorch-fid take it. Needs two rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.n}")
        self._flush()
        return (self._scatter + self._scatter.T) / (2 * (self._count - 1))

    def _flush(self) -> None:
        if self._pending:
            self._join(*_moments(torch.cat(self._pending)))
            self._pending = []

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self._count + count
        if total == 0:
            return
        gap = mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(gap, gap, alpha=self._count * count / total)
        self._mean += gap * (count / total)
        self._count = total


def _moments(rows: Tensor) -> tuple[int, Tensor, Tensor]:
    """(count, mean, scatter about it) of rows [B,dim]."""
    rows = rows.double()
    mean = rows.mean(0)
    centred = rows - mean
    return len(rows), mean, centred.T @ centred
