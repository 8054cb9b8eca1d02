#!/usr/bin/env python3
"""Writes the tables of benchmarks/bench_train-*.json and bench_kernels-*.json into the documents, between markers.

    python benchmarks/bench_table.py [--check] [DOCUMENT ...]      README.md and docs/lab/throughput.md by default

A document takes part with the two lines

    <!-- bench_train -->
    <!-- /bench_train -->

or those of bench_kernels. `<!-- bench_train cpu cpu-amx -->` shows bench_train-cpu.json and bench_train-cpu-amx.json
alone.
--check changes nothing and ends with exit code 1 where a document does not show what the JSON files say.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "bvae": "bvae",
    "bvae_compile": "bvae `--compile`",
    "bvae_no_compile": "bvae `--no-compile`",
    "plain": "plain loop",
    "eager_amp": "eager AMP",
    "compile": "torch.compile",
    "pythae": "pythae",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("documents", nargs="*", type=Path)
    args = parser.parse_args(argv)
    documents = args.documents or [p for p in (ROOT / "README.md", ROOT / "docs/lab/throughput.md") if p.exists()]
    tables = {}
    for name, describe in (("bench_train", describe_train), ("bench_kernels", describe_kernels)):
        paths = sorted((ROOT / "benchmarks/results").glob(f"{name}-*.json"))
        tables[name] = {p.stem.removeprefix(f"{name}-"): describe(json.loads(p.read_text())) for p in paths}
    stale = []
    for document in documents:
        text = written = document.read_text()
        for name, described in tables.items():
            written = inserted(written, name, described)
        if written != text:
            stale.append(document)
            if not args.check:
                document.write_text(written)
    for document in stale:
        print(f"{document}: {'does not show what the JSON files say' if args.check else 'written'}")
    return 1 if args.check and stale else 0


def inserted(text: str, name: str, tables: dict[str, str]) -> str:
    """`text` with tables between the markers of `name`, those named there or all; as it is without markers."""
    found = re.search(f"<!-- {name}((?: [a-z0-9-]+)*) -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    if found is None:
        return text
    shown = "\n".join(tables[key] for key in found[1].split() or tables)
    return text[: found.start(2)] + shown + text[found.end(2) :]


def circumstances(report: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"`{report['command']}` on {report['date']}: {report['device']}; {versions}; commit {report['commit']}."


def describe_kernels(report: dict) -> str:
    """One measurement of bench_kernels as a Markdown table with its circumstances."""
    lines = ["| op | size | type | bvae, us | eager | torch.compile |", "|---|---|---|---|---|---|"]
    for r in report["results"]:
        over = [r.get(f"{rival}_over_fused") for rival in ("eager", "compiled")]
        cells = [f"{r['fused']['median']:,.0f}"] + ["" if x is None else f"{x:.2f}x" for x in over]
        lines.append(f"| `{r['op']}` | {r['size']} | {r['type']} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        f"{circumstances(report)} bvae's time, the median over rounds in which all take turns, and how many times as "
        f"long the others take; copying memory moves {report['copy_bytes_per_s'] / 1e9:.1f} GB/s."
    )
    return "\n".join(lines) + "\n"


def describe_train(report: dict) -> str:
    """One measurement of bench_train as a Markdown table with its circumstances."""
    device = "cuda" if "cuda" in report else "cpu"
    recipes = [(r, s) for r, stages in report[device].items() if r not in ("stage1", "stage2") for s in rows(stages)]
    names = [n for n in NAMES if any(n in report[device][r][s] for r, s in recipes)]
    lines = [
        "| images/s | " + " | ".join(NAMES[n] for n in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for recipe, stage in recipes:
        figures = report[device][recipe][stage]
        cells = [cell(figures.get(n), n) for n in names]
        lines.append(f"| `{recipe}`, stage {stage[-1]} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        f"{circumstances(report)}{' It has no bf16 units: all train in fp32.' * (not report['bf16'])} In brackets: how "
        "many times as fast bvae is, the median over rounds in which all take turns."
    )
    return "\n".join(lines) + "\n"


def rows(stages: object) -> list[str]:
    return [s for s in ("stage1", "stage2") if isinstance(stages, dict) and isinstance(stages.get(s), dict)]


def cell(figures: dict | None, name: str) -> str:
    if figures is None:
        return ""
    rate = f"{figures['images_per_s']:,.0f}"
    return rate if name == "bvae" else f"{rate} ({figures['bvae_is_faster_by']:.2f}x)"


if __name__ == "__main__":
    sys.exit(main())
