"""python -m bvae.study: a table or figure over several trainings and seeds, by one command (docs/studies.md).

It runs what is missing and leaves what is there: killed, or called again with more seeds, it goes on.
"""

import argparse
import contextlib
import dataclasses
import shlex
import sys
from pathlib import Path

from bvae.errors import Interrupted, UserError, run_command
from bvae.studies.cells import Scope
from bvae.studies.definitions import STUDIES, find_study
from bvae.studies.display import Display
from bvae.studies.jobs import Lock, Place, cpu_places, gpu_places, visible_gpus
from bvae.studies.kinds import Study
from bvae.studies.mps import mps
from bvae.studies.plan import Options, Plan, make_plan
from bvae.studies.run import LOGS, Runner
from bvae.studies.store import Store

HIDDEN = ("--part", "--copy")
"""options that do not bear on what is measured"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bvae.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of --list")
    parser.add_argument("--list", action="store_true", help="print the studies")
    parser.add_argument("--dry-run", action="store_true", help="print the cells and run nothing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the study, runs/study-NAME by default")
    parser.add_argument(
        "--data", action="append", default=[], metavar="[NAME=]PATH", help="images; NAME where a study has several sets"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="trainings a row, by seeds 0 to N-1")
    parser.add_argument("--scale", type=float, default=1.0, metavar="F", help="multiply epochs and halving intervals")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="a setting of bvae.train, for rows that have it",
    )
    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="trainings side by side (default: one a device)"
    )
    group.add_argument("--part", type=_part, default=(1, 1), metavar="i/n", help="run the i-th of n parts")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.add_argument(
        "--mps", action="store_true", help="let trainings on one GPU run at the same time (docs/studies.md)"
    )
    group = parser.add_argument_group("FID")
    group.add_argument("--inception", metavar="PATH", help="weights of the network; without them FIDs are left out")
    group.add_argument("--no-fid", action="store_true", help="leave FIDs out")
    group.add_argument("--protocol", choices=("tf1", "pytorch-fid", "clean"), default="tf1")
    group.add_argument("--precision", choices=("fp32", "bf16"), help="precision of the network; default: the study's")
    group.add_argument("--fid-num", type=int, default=10_000, metavar="N", help="generated images")
    group = parser.add_argument_group("output")
    group.add_argument("--copy", type=Path, metavar="PATH", help="write study.json here too, without paths")
    args = parser.parse_args(argv)
    if (args.name is None) == (not args.list):
        parser.error("give the NAME of a study, or --list")
    for name, least in (("seeds", 1), ("fid_num", 2)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if args.jobs < 0:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    if not 0 < args.scale < float("inf"):
        raise UserError(f"--scale must be a positive number, not {args.scale}")
    return args


def _part(text: str) -> tuple[int, int]:
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be i/n, as in 2/5, not {text!r}") from None
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"must be from 1/{parts} to {parts}/{parts}, not {text}")
    return part, parts


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.list:
        width = max(map(len, STUDIES))
        for study in STUDIES.values():
            print(f"{study.name:{width}}  {study.title}")
        return 0
    study = find_study(args.name)
    plan = make_plan(study, options_of(args, study))
    if args.dry_run:
        print_cells(plan)
        return 0
    return run(plan, args, command_of(argv))


def options_of(args: argparse.Namespace, study: Study) -> Options:
    return Options(
        out=args.out or Path("runs") / f"study-{study.name}",
        data=tuple(args.data),
        seeds=args.seeds or study.seeds,
        scale=args.scale,
        sets=tuple(args.set),
        device=args.device,
        inception=None if args.no_fid or args.dry_run else _weights(args.inception),
        protocol=args.protocol,
        precision=args.precision or study.precision,
        fid_num=args.fid_num,
        part=args.part,
    )


def _weights(given: str | None) -> str | None:
    from bvae.metrics.weights import find_weights  # torch takes seconds to import, which --list need not wait for

    found = find_weights(given)
    return None if found is None else str(found)


def command_of(argv: list[str]) -> str:
    """The command by which the study's figures are made again: without where and side by side with what they were."""
    kept, skip = [], False
    for text in argv:
        if skip or text.partition("=")[0] in HIDDEN:
            skip = not skip and text in HIDDEN
        else:
            kept.append(text)
    return shlex.join(["python", "-m", "bvae.study", *kept])


def print_cells(plan: Plan) -> None:
    """The rows with their settings, and the cells in the order in which they run."""
    said = f"{plan.study.name}: {plan.study.title}"
    print(said + (f", scaled by {plan.options.scale:g}" if plan.options.scale != 1 else ""))
    for note in plan.notes:
        print(f"note: {note}")
    for planned in plan.rows.values():
        row = planned.row
        if row.run:
            print(f"row {row.name}: reads the runs of {row.run}")
            continue
        problem = f"   cannot be trained: {planned.problem}" if planned.problem else ""
        print(f"row {row.name}: {' '.join(f'{k}={v}' for k, v in planned.stated().items())}{problem}")
    cells = plan.cells_of_part()
    for cell in cells:
        print(f"cell {cell.name}")
    print(f"{len(cells)} cells")


def run(plan: Plan, args: argparse.Namespace, command: str) -> int:
    from bvae.studies.write import write_all  # with torch, which takes seconds to import, and --list need not wait for

    study, options = plan.study, plan.options
    check_data(plan)
    with Lock(options.out, options.part) as lock:
        scope = Scope(plan)
        data = [text.partition("=")[2] or text for text in args.data]
        store = Store(scope, command, args.copy, [*data, str(args.out or ""), args.inception or ""])
        display = Display()
        for note in plan.notes:
            display.say(f"note: {note}")
        if options.inception is None and any(row.fids or row.priors for row in study.rows):
            display.say("note: FIDs are left out: the weights of their network are not at hand (--inception)")
        where = places(args.jobs, options.device)
        failed = 0
        try:
            with contextlib.ExitStack() as stack:
                more = stack.enter_context(mps(options.out / LOGS / "mps.log")) if args.mps else {}
                where = [dataclasses.replace(place, environment={**place.environment, **more}) for place in where]
                failed = Runner(scope, store, where, display, lock.files).run()
        except Interrupted as interrupted:
            display.say(str(interrupted))
            return 128 + interrupted.signal
        finally:
            found = store.save()
            written = write_all(scope, found)
        for path in written:
            display.say(str(path))
    return 1 if failed else 0


def check_data(plan: Plan) -> None:
    """Raises UserError where a row that could be trained names no images, or no row can be trained at all."""
    rows = [planned for planned in plan.rows.values() if not planned.row.run]
    for planned in rows:
        if planned.config and planned.config.get("data") is None:
            raise UserError(f"{plan.study.name} needs --data: images for the preset {planned.config.get('preset')}")
    if rows and all(planned.problem for planned in rows):
        raise UserError(f"no row of {plan.study.name} can be trained: {rows[0].problem}")
    if plan.study.picture == "filters" and not plan.options.data:
        raise UserError(f"{plan.study.name} needs --data: a folder or archive of photographs")


def places(jobs: int, device: str) -> list[Place]:
    """Where trainings run: on the GPUs there are, or on cores."""
    import torch  # takes seconds, which --list need not wait for

    count = 0 if device == "cpu" else torch.cuda.device_count()
    if device == "cuda" and not count:
        raise UserError("--device cuda: this torch sees no CUDA device (python -m bvae.info tells more)")
    return gpu_places(jobs or count, visible_gpus(count)) if count else cpu_places(jobs or 1)


if __name__ == "__main__":
    run_command(main)
