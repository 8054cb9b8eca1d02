"""The command line `bvae`, its cost, and what train.main leaves behind in a process that goes on."""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import bvae
from bvae import __main__ as command
from bvae import train
from bvae.config import Config
from bvae.errors import UserError
from bvae.models.resnet import ResNetDecoder, ResNetEncoder
from bvae.two_stage import TwoStageVAE

TINY = (
    *("--side", "16", "--scales", "2", "--base", "4", "--fc", "16", "--latents", "4"),
    *("--batch", "50", "--max-steps", "1", "--device", "cpu"),
)


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


# ---- bvae COMMAND ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_is_there_and_takes_its_arguments(name):
    module, description = command.COMMANDS[name]
    assert importlib.util.find_spec(module) is not None, f"{module} is missing"
    assert description[0].islower()
    assert not description.endswith(".")
    main = importlib.import_module(module).main
    first = next(iter(inspect.signature(main).parameters.values()))
    assert first.name == "argv"
    assert first.default is None


def test_a_command_gets_what_follows_its_name(monkeypatch):
    seen = []

    def main(argv):
        seen.append(argv)
        return {"sound": None, "lost": 3}[argv[0]]

    monkeypatch.setitem(sys.modules, "fake_command", SimpleNamespace(main=main))
    monkeypatch.setitem(command.COMMANDS, "fake", ("fake_command", "for this test"))
    assert command.main(["fake", "sound", "--x", "1"]) == 0
    assert command.main(["fake", "lost"]) == 3
    monkeypatch.setattr(sys, "argv", ["bvae", "fake", "sound"])
    assert command.main() == 0
    assert seen == [["sound", "--x", "1"], ["lost"], ["sound"]]


def test_what_is_no_command_is_told(capsys):
    for argv, problem in (([], "a command is missing"), (["trian"], "there is no command 'trian'")):
        assert command.main(argv) == 2
        out, err = capsys.readouterr()
        assert not out
        assert problem in err
        assert "train" in err


def test_help_names_every_command(capsys):
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, description) in command.COMMANDS.items():
        assert f"  {name} " in text
        assert description in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_errors_and_exit_codes_are_those_of_the_command(tmp_path):
    done = python(
        "-m", "bvae", "sample", "nowhere", cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 2
    assert done.stderr == "error: nowhere: not a run or a saved model (it has no config.json)\n"


def test_the_version():
    done = python("-m", "bvae", "--version", check=True)
    assert done.stdout == f"bvae {bvae.__version__}\n"


HEAVY = ("torch", "numpy", "matplotlib", "PIL", "safetensors", "tyro", "rich", "argparse", "inspect", "asyncio")
SPY = """
import sys
before = set(sys.modules)
{code}
new = set(sys.modules) - before
print(*sorted(name for name in {heavy} if name in new))
print(len(new))
"""


@pytest.mark.parametrize(
    "code",
    ["import bvae", "import bvae; bvae.UserError; bvae.__version__", "from bvae.__main__ import main; main(['-h'])"],
)
def test_nothing_is_imported_that_is_not_needed(code):
    """Counted, not timed: a busy machine must not decide. -S leaves out what the environment's .pth files import."""
    text = SPY.format(code=code, heavy=HEAVY)
    done = python("-S", "-c", text, check=True, env=os.environ | {"PYTHONPATH": os.path.dirname(bvae.__path__[0])})
    *_, heavy, number = done.stdout.splitlines()
    assert heavy == ""
    assert int(number) < 90  # typing and importlib.abc take 60


# ---- train.main in a process that goes on ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """The options of a short training run, on a file whose name is not UTF-8."""
    path = tmp_path_factory.mktemp("data") / os.fsdecode(b"d\xe9t.npy")
    np.save(path, np.random.default_rng(0).integers(0, 255, (120, 16, 16, 3), np.uint8))
    return ["--preset", "cifar10", "--data", str(path), *TINY, "--epochs", "1", "--epochs2", "0"]


def test_training_puts_the_handlers_back(arguments, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert "t.npy" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_training_works_in_a_thread(arguments, tmp_path):
    """Where no handlers can be set."""
    codes = []
    run = tmp_path / "run"
    thread = threading.Thread(target=lambda: codes.append(train.main([*arguments, "--out", str(run)])))
    thread.start()
    thread.join()
    assert codes == [0]
    assert (run / "results.json").exists()


def test_a_run_whose_name_is_not_utf8_is_refused_before_anything_is_done(arguments, tmp_path):
    for option in ("--out", "--resume"):
        with pytest.raises(UserError):
            train.main([*arguments, option, str(tmp_path / os.fsdecode(b"r\xe9n"))])
    with pytest.raises(UserError, match="not UTF-8"):
        train.main([*arguments, "--out", str(tmp_path / os.fsdecode(b"r\xe9n"))])
    assert not os.listdir(tmp_path)


# ---- SIGINT ---------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from types import SimpleNamespace
from bvae import __main__ as command
def main(argv):
    print("ready", flush=True)
    time.sleep(60)
sys.modules["slow"] = SimpleNamespace(main=main)
command.COMMANDS["slow"] = ("slow", "")
sys.argv = ["bvae", "slow"]
command.console()
"""


def test_ctrl_c_in_a_command_is_one_line():
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted\n"


@pytest.mark.parametrize("name", ["sample", "evaluate", "report", "export"])
def test_an_interrupted_command_leaves_what_was_there(tmp_path, monkeypatch, name):
    """Interrupted where the model's pass begins."""
    run, out = tmp_path / "run", tmp_path / "out.png"
    config = Config(preset="shapes", data="shapes", side=16, scales=2, base=4, fc=8, latents=3, hidden=16, epochs2=0)
    TwoStageVAE(dataclasses.replace(config, shapes_train=100, shapes_test=20)).save_pretrained(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    out.write_bytes(b"before")
    more = {
        "sample": ["--device", "cpu", "--stage", "1", "--out", str(out)],
        "evaluate": ["--device", "cpu", "--no-fid", "--json", str(out)],
        "report": ["--device", "cpu", "--out", str(out)],
        "export": ["--format", "torch"],
    }

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ResNetDecoder, "forward", interrupt)
    monkeypatch.setattr(ResNetEncoder, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        command.main([name, str(run), *more[name]])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert out.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "run"]
