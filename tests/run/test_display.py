"""The progress in a notebook: one line of a cell's output, replaced again and again."""

import sys
import types

import pytest
from rich.console import Console

from bvae.run import display
from bvae.run.display import Display


@pytest.fixture
def shown(monkeypatch):
    """What a notebook's cell has shown, line by line; a replaced line keeps its place."""
    lines = []

    class Handle:
        def __init__(self, place):
            self.place = place

        def update(self, text):
            lines[self.place] = text

    def show(text, display_id):
        lines.append(text)
        return Handle(len(lines) - 1)

    module = types.ModuleType("IPython.display")
    module.Pretty, module.display = str, show
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(display, "REFRESH_SECONDS", 0.0)
    return lines


def test_a_notebook_has_one_line_a_stage_that_is_replaced(shown):
    console = Console(force_jupyter=True)
    progress = Display(console)
    progress.start(1, 2, 10, 0, 50, 20)
    for _ in range(10):
        progress.step(1, {"loss": 3.0})
    progress.epoch({"stage": 1, "epoch": 1, "step": 10, "mse": 0.25, "gamma2": 0.5})
    assert len(shown) == 1
    assert shown[0].startswith("stage 1  epoch 2/2  step 10/20") and "mse 0.25" in shown[0]
    progress.start(2, 3, 5, 0, 50, 15)
    progress.step(15, None)
    progress.stop()
    assert len(shown) == 2 and shown[1].startswith("stage 2  epoch 3/3  step 15/15")
