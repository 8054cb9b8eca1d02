"""python -m bvae.report: one self-contained page on a run, or on several side by side."""

import argparse
from pathlib import Path

from bvae.errors import run_command
from bvae.report.write import COMPARISON, REPORT, write_report
from bvae.two_stage import read_run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bvae.report", description=__doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's folder; several are compared")
    parser.add_argument(
        "--out", type=Path, help=f"the page; by default RUN/{REPORT}, or {COMPARISON} here for several runs"
    )
    parser.add_argument("--data", help="images as for training; by default what each run was trained on")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    for folder in args.runs:
        read_run(folder)  # all of them, before minutes are spent on the first
    print(f"report: {write_report(args.runs, args.out, source=args.data, device=args.device)}")


if __name__ == "__main__":
    run_command(main)
