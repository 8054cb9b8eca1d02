"""How a command line ends: one line on stderr and code 2, whatever a user has done; never a traceback."""

import os
import subprocess
import sys

import pytest

from bvae.errors import Interrupted, UserError, run_command
from bvae.files import check_output, given_path


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("two\nlines"), "error: two lines"),
        (ValueError("not a number\nmore"), "error: unforeseen ValueError (not a number); BVAE_TRACEBACK=1"),
        (KeyError(7), "error: unforeseen KeyError (7)"),
        (RuntimeError(""), "error: unforeseen RuntimeError (without a word)"),
        (MemoryError(), "error: not enough memory (out of memory): use less"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't allocate memory): use less"),
        (FileNotFoundError(2, "No such file", "x"), "error: x: No such file"),
        (Interrupted(15, "stopped"), "unforeseen Interrupted"),
    ],
)
def test_every_error_is_one_line_and_code_2(error, line, capsys, monkeypatch):
    monkeypatch.delenv("BVAE_TRACEBACK", raising=False)

    def command():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(command, "use less")
    err = capsys.readouterr().err
    assert ended.value.code == 2 and line in err and len(err.splitlines()) == 1


def test_a_traceback_is_there_for_who_asks(capsys, monkeypatch):
    monkeypatch.setenv("BVAE_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        run_command(lambda: int("x"))
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(capsys):
    def command():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(command)
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_output_that_nobody_reads_is_no_error():
    code = "from bvae.errors import run_command; run_command(lambda: print('x\\n' * 100000))"
    line = f'"{sys.executable}" -c "{code}" | head -1'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stdout == "x\n" and done.stderr == ""


def test_closed_streams_are_held_by_nothing():
    code = (
        "from bvae.errors import run_command; import os, sys\n"
        "def main():\n"
        "    print('lost'); print('lost', file=sys.stderr)\n"
        "    os._exit(0 if os.open(os.devnull, 0) > 2 else 1)\n"
        "run_command(main)"
    )
    line = '"$0" -c "$1" 0<&- 1>&- 2>&-'
    assert subprocess.run(["sh", "-c", line, sys.executable, code], timeout=60).returncode == 0


def test_an_output_is_checked_without_a_trace(tmp_path):
    check_output(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("old")
    check_output(tmp_path / "b.json")
    assert os.listdir(tmp_path) == ["b.json"] and (tmp_path / "b.json").read_text() == "old"
    for wrong in (tmp_path, tmp_path / "no" / "a.json", tmp_path / "b.json" / "c"):
        with pytest.raises(UserError, match="cannot write"):
            check_output(wrong)
    with pytest.raises(Exception, match="empty"):
        given_path("  ")
