#!/usr/bin/env bash
# The paper's whole Table 2 (CIFAR-10) on one GPU: computed and learned gamma, Dai & Wipf's epochs, RAE-L2.
#
#     tools/table2.sh OUT CIFAR10 [SEEDS]
#
# CIFAR10 is its official folder. First measures how fast both stages train here and prints the hours that all rows will
# take one after the other. Killed or stopped, the same command goes on. JOBS: trainings side by side (default 1);
# INCEPTION: the weights of the FID network (default: what bvae finds, else they are downloaded); PYTHON;
# ARGS: further arguments of bvae.study, such as --mps or --scale 0.1.
set -euo pipefail
out=$1 cifar=$2 seeds=${3:-5}
python=${PYTHON:-python} jobs=${JOBS:-1} inception=${INCEPTION:-download}
study=("$python" -m bvae.study table2 --data "$cifar" --seeds "$seeds" --inception "$inception" --out "$out" --jobs "$jobs")
mkdir -p "$out"

if [ ! -e "$out/trial/results.json" ]; then
    rm -rf "$out/trial"
    "$python" -m bvae.train --preset cifar10 --data "$cifar" --epochs 3 --epochs2 3 --eval-every 0 --no-compile --out "$out/trial"
fi
# shellcheck disable=SC2086 (ARGS is a list)
"${study[@]}" --dry-run ${ARGS:-} | "$python" -c '
import json, re, sys
from pathlib import Path

records = [json.loads(line) for line in (Path(sys.argv[1]) / "trial" / "metrics.jsonl").read_text().splitlines()]
# The first epoch holds the start of CUDA and its graph.
spent = {stage: [r["seconds"] for r in records if r["stage"] == stage] for stage in (1, 2)}
epoch = {stage: (seconds[-1] - seconds[0]) / (len(seconds) - 1) for stage, seconds in spent.items()}
text, hours = sys.stdin.read(), 0.0
scale = re.search(r"scaled by ([\d.e-]+)", text.splitlines()[0])
for row in re.findall(r"^row .*$", text, re.M):
    if "cannot be trained" in row or "reads the runs" in row or "family=rae" in row:
        continue
    given = dict(re.findall(r"(epochs2?)=(\d+)", row))
    factor = float(scale[1]) if scale else 1.0
    first, second = (int(given.get(name, default * factor)) for name, default in (("epochs", 700), ("epochs2", 1400)))
    hours += (first * epoch[1] + second * epoch[2]) / 3600
seeds = int(sys.argv[2])
print(f"an epoch of stage 1 takes {epoch[1]:.2f} s here, one of stage 2 {epoch[2]:.2f} s")
print(f"expected: {hours:.1f} h a seed, {hours * seeds:.1f} h for {seeds} seeds one after the other, without RAE-L2 and FIDs")
' "$out" "$seeds"
# shellcheck disable=SC2086
"${study[@]}" ${ARGS:-}
