#!/usr/bin/env bash
# The FIDs of docs/fid.md between real images, each written as JSON into a folder:
#
#     benchmarks/real_fids.sh OUT CIFAR10 CELEBA [RUN]
#
# CIFAR10 is its official folder, CELEBA img_align_celeba.zip (or part of it), RUN a run trained on CIFAR-10.
# PYTHON, PRECISION (fp32 or bf16) and NUM (of CIFAR-10's images a side) can be set. About 80,000 images go through the
# network; statistics of images are cached, so that a second call goes on where the first was stopped. Ends with a table.
set -euo pipefail
out=$1 cifar=$2 celeba=$3 run=${4:-}
python=${PYTHON:-python} precision=${PRECISION:-fp32} num=${NUM:-10000}
tools=$(dirname "$0")/../tools
mkdir -p "$out"

fid() { # NAME A B [OPTION...]
    "$python" "$tools/fid.py" "${@:2}" --precision "$precision" --json "$out/$1.json"
}

# Faces by halves: the reference, the same faces under other filters, and other faces under the same one.
prepare() { # NAME OPTION...
    [ -d "$out/celeba-$1" ] || "$python" "$tools/prep_celeba.py" "$celeba" --out "$out/celeba-$1" --split 0.5,0,0.5 "${@:2}"
}
prepare bilinear
prepare nearest --filter nearest
prepare bilinear-plain --filter bilinear --no-antialias
prepare bicubic --filter bicubic
prepare lanczos --filter lanczos

fid cifar10-test-train "$cifar:test" "$cifar:train" --num "$num" --kid --prdc
fid celeba-floor "$out/celeba-bilinear:test" "$out/celeba-bilinear:train"
for name in nearest bilinear-plain bicubic lanczos; do
    fid "celeba-$name" "$out/celeba-bilinear:test" "$out/celeba-$name:test"
done
if [ -n "$run" ]; then
    "$python" -m bvae.evaluate "$run" --data "$cifar" --precision "$precision" --fid-num "$num" --rec sampled \
        --json "$out/run.json"
fi

"$python" - "$out" <<'TABLE'
import json, sys
from pathlib import Path

for path in sorted(Path(sys.argv[1]).glob("*.json")):
    r = json.loads(path.read_text())
    if path.stem == "run":
        for protocol, found in r["fid"].items():
            for name in ("rec", "gen1", "gen2", "gen2_rescaled"):
                counts = f"{found['n_reference' if name == 'rec' else 'n']} against {found['n_reference']}"
                print(f"| {path.stem} {name} | {protocol}, {found['precision']} | {counts} | {found[name]:.2f} |")
        continue
    print(f"| {path.stem} | {r['protocol']}, {r['precision']} | {r['n']} against {r['n_reference']} | {r['fid']:.2f} |")
    for name in ("kid", "prdc"):
        if name in r:
            print(f"|   {name} | " + ", ".join(f"{key} {value:.4g}" for key, value in r[name].items()) + " | | |")
TABLE
