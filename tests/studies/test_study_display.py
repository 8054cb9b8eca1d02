"""The one display for all trainings."""

import io

from rich.console import Console

from bvae.studies.display import Display, Line

RECORD = {"stage": 2, "epoch": 7, "mse": 0.0123456, "kl": 21.5, "images_per_s": 1234.5}
LINES = [
    Line("computed-s0", "training", "core 0", RECORD, (10, 20), 75.0),
    Line("learned-s1", "FIDs", "core 1", RECORD, (10, 20), 3.0),
]


def test_a_terminal_shows_every_training_and_the_whole() -> None:
    said = io.StringIO()
    display = Display(Console(file=said, force_terminal=True, width=120, color_system=None))
    with display:
        assert display.due()
        display.show(LINES, done=3, failed=1, total=10)
        assert not display.due()
    text = said.getvalue()
    (training,) = {line for line in text.splitlines() if "computed-s0" in line}
    assert training.split() == [
        "computed-s0",
        "training",
        "2:",
        "7/20",
        "0.01235",
        "21.50",
        "1,234",
        "0:01:15",
        "core",
        "0",
    ]
    (scoring,) = {line for line in text.splitlines() if "learned-s1" in line}
    assert scoring.split() == ["learned-s1", "FIDs", "0:00:03", "core", "1"]  # the last epoch is not what it is at
    assert "3 of 10 cells done, 1 failed" in text


def test_elsewhere_it_says_a_line_an_event() -> None:
    said = io.StringIO()
    with Display(Console(file=said)) as display:
        assert not display.due()
        display.show(LINES, 0, 0, 10)
        display.say("computed-s0: done [1]")
    assert said.getvalue() == "computed-s0: done [1]\n"
