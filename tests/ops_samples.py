"""The inputs that every test of the fused ops draws from."""

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# How far a result in this type may be from the float64 twin, relative to the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-6}


class LossSample(NamedTuple):
    name: str
    recon: Tensor
    target: Tensor


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory: channels_last, gaps, an unaligned start."""
    out = {"contiguous": x.contiguous()}
    if x.dim() == 4:
        out["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1] + 1), dtype=x.dtype, device=x.device)
    wide[..., : 2 * x.shape[-1] : 2] = x
    out["gaps"] = wide[..., : 2 * x.shape[-1] : 2]
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    flat[1:] = x.flatten()
    out["unaligned"] = flat[1:].view(x.shape)
    return out


SHAPES = [(0, 3, 4, 4), (1, 1), (5,), (3, 7), (2, 3, 5, 7), (1, 1, 1, 17), (4, 0, 2), (9, 3, 32, 32), (70, 1000)]


def loss_samples(dtype: torch.dtype, device: str):
    """Reconstructions and targets: sizes that are empty, single, odd, larger than a chunk; every layout of each."""
    g = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        recon = (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype).to(device)
        byte = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8).to(device)
        real = torch.rand(shape, generator=g).to(device)
        small = shape != SHAPES[-1]
        for r_name, r in (layouts(recon) if small else {"contiguous": recon}).items():
            yield LossSample(f"{shape} {r_name} uint8", r, byte)
        for t_name, t in (layouts(byte) if small else {}).items():
            yield LossSample(f"{shape} contiguous, uint8 {t_name}", recon, t)
        for t_dtype in DTYPES:
            yield LossSample(f"{shape} {t_dtype}", recon, real.to(t_dtype))
        if recon.dim() == 4:
            nhwc = byte.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # what gather's rows are
            yield LossSample(f"{shape} channels_last rows", layouts(recon)["channels_last"], nhwc)


class PosteriorSample(NamedTuple):
    name: str
    mu: Tensor
    log_sigma: Tensor


POSTERIOR_SHAPES = [(0, 6), (1, 1), (1, 4), (5, 3), (7, 64), (3, 2, 5), (2, 300), (130, 34), (4, 0), (6,)]


def posterior_samples(dtype: torch.dtype, device: str):
    g = torch.Generator().manual_seed(1)
    for shape in POSTERIOR_SHAPES:
        mu = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device)
        log_sigma = (torch.randn(shape, generator=g, dtype=torch.float64) - 1).to(dtype).to(device)
        yield PosteriorSample(f"{shape}", mu, log_sigma)
        if len(shape) > 1:
            other = layouts(log_sigma)
            for name, m in layouts(mu).items():
                yield PosteriorSample(f"{shape} {name}", m, other[name])
            both = torch.cat([mu, log_sigma], dim=1)  # one head of twice the width
            yield PosteriorSample(f"{shape} halves", *both.chunk(2, dim=1) if shape[1] else (mu, log_sigma))
