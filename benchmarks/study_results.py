#!/usr/bin/env python3
"""Writes docs/results.md from benchmarks/results/studies/*.json, which `bvae.study evidence-... --copy` leaves.

    python benchmarks/study_results.py [--check]

--check writes nothing and exits with 1 where the document is not what the files give.
"""

import argparse
import json
import sys
from pathlib import Path

from bvae.studies.evidence import STUDIES
from bvae.studies.kinds import Study
from bvae.studies.table import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "studies"
DOCUMENT = ROOT / "docs" / "results.md"
DATA = {"evidence-fashion": "FASHION", "evidence-mnist": "MNIST"}
"""word that stands for the images in a command"""

HEAD = """# Results

Made by `benchmarks/study_results.py` from `benchmarks/results/studies/`; [studies.md](studies.md) explains the figures.
Every table says the command, the machine and the versions that made it, and holds every seed's value.
"""


def file_of(study: Study) -> Path:
    return RESULTS / f"{study.name.removeprefix('evidence-')}.json"


def command(study: Study) -> str:
    data = f" --data {DATA[study.name]}" if study.name in DATA else ""
    return f"python -m bvae.study {study.name}{data} --copy {file_of(study).relative_to(ROOT)}"


def document() -> str:
    parts, missing = [HEAD], []
    for study in STUDIES:
        if file_of(study).exists():
            found = json.loads(file_of(study).read_text())
            # A level below this document's own heading.
            lines = [f"#{line}" if line.startswith("#") else line for line in markdown(study, found).splitlines()]
            parts.append("\n".join(lines) + "\n")
        else:
            missing.append(f"* {study.title}: `{command(study)}`")
    if missing:
        parts.append("\n".join(["## Not measured yet", "", *missing]) + "\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    text = document()
    if args.check:
        same = DOCUMENT.exists() and DOCUMENT.read_text() == text
        print(f"{DOCUMENT.name} {'is' if same else 'is not'} what the results give")
        return 0 if same else 1
    DOCUMENT.write_text(text)
    print(DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
