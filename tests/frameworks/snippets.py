"""The snippets of docs/frameworks.md, and small images to train on."""

import re
from pathlib import Path
from typing import Any

import torch

TEXT = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text()


def run(heading: str, **names: Any) -> dict[str, Any]:
    """Runs the snippet below `heading` with `names` defined; returns all names it has then."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    names["__name__"] = "snippet"
    exec(compile(code, f"docs/frameworks.md, {heading}", "exec"), names)
    return names


def classes(heading: str) -> dict[str, Any]:
    """The names that the snippet defines before it uses them: its imports and its class."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(code.split("\n\n\n")[0] + "\n\n\n" + code.split("\n\n\n")[1], names)
    return names


def blobs(n: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """n images [n,channels,8,8] in [0,1] of a bright spot at a random place."""
    g = torch.Generator().manual_seed(seed)
    place = torch.rand(n, 2, 1, 1, generator=g) * 6 + 1
    grid = torch.arange(8.0)
    distance2 = (grid.view(1, 8, 1) - place[:, 0]) ** 2 + (grid.view(1, 1, 8) - place[:, 1]) ** 2
    return torch.exp(-distance2 / 4).unsqueeze(1).expand(n, channels, 8, 8).contiguous()


def follow(gamma2: float, errors: list[float]) -> float:
    """gamma2 after training steps of these mse, by the paper's rule in float64."""
    for mse in errors:
        gamma2 = max(1e-8, min(gamma2, 0.99 * gamma2 + 0.01 * mse))
    return gamma2
