"""Proves that a change of the code changes no result: short `shapes` runs before and after it end with the same bits.

    python benchmarks/check_bits.py --json before.json       # in a checkout of the code before
    python benchmarks/check_bits.py --against before.json    # in the checkout to be proved

Four runs of both stages on the CPU, with one thread: fp32 and bf16 (fp32 where the processor has no bf16 units), each
plain and interrupted once in every stage. Tensors are compared by value, not by name and not as files: every tensor of
the last checkpoint is digested, and the sorted digests must be equal.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    *("--preset", "shapes", "--shapes-train", "600", "--shapes-test", "100", "--hflip", "--eval-images", "100"),
    *("--base", "4", "--fc", "16", "--hidden", "32", "--latents", "8", "--epochs", "3", "--epochs2", "3"),
    *("--bn-batches", "10", "--device", "cpu", "--no-compile", "--checkpoint-seconds", "0"),
)
MOMENTS = ((1, 1), (2, 1))  # (stage, epoch) after which the interrupted runs are stopped
LIMIT = 300  # seconds a run may take


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bvae.train", *arguments]
    return subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait(LIMIT):
        raise SystemExit(f"error: {' '.join(map(str, process.args))} has ended with exit code {process.returncode}")


def reached(run: Path, stage: int, epoch: int) -> bool:
    """True if the run's records hold that epoch."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return False
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return any((r["stage"], r["epoch"]) >= (stage, epoch) for r in records)


def train(run: Path, amp: bool, interrupted: bool) -> int:
    """Trains a run to its end; returns how often it was interrupted."""
    process = start([*SETTINGS, "--amp" if amp else "--no-amp", "--out", str(run)])
    stops = 0
    for stage, epoch in MOMENTS if interrupted else ():
        deadline = time.monotonic() + LIMIT
        while process.poll() is None and not reached(run, stage, epoch) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        if process.wait(LIMIT) == 128 + signal.SIGTERM:
            stops += 1
            process = start(["--resume", str(run)])
    finish(process)
    return stops


def digests(path: Path) -> list[str]:
    """The sorted digests of a safetensors file's tensors, each over type, shape and values."""
    found = []
    with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118 (no dict)
            values = file.get_tensor(name)
            text = f"{values.dtype} {values.shape}".encode()
            found.append(hashlib.sha256(text + values.tobytes()).hexdigest()[:16])
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the digests to this file")
    parser.add_argument("--against", type=Path, help="compare with the digests in this file")
    args = parser.parse_args()
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for amp in (False, True):
            for interrupted in (False, True):
                name = f"{'bf16' if amp else 'fp32'}, {'resumed' if interrupted else 'plain'}"
                run = Path(folder, name.replace(", ", "-"))
                stops = train(run, amp, interrupted)
                found[name] = digests(run / "checkpoints/last.safetensors")
                print(f"{name}: {len(found[name])} tensors, interrupted {stops} times", flush=True)
                if interrupted and found[name] != found[name.replace("resumed", "plain")]:
                    raise SystemExit(f"error: {name}: other bits than without the interruption")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.against:
        before = json.loads(args.against.read_text())
        differ = [name for name, values in found.items() if values != before[name]]
        if differ:
            raise SystemExit(f"error: other bits than before: {'; '.join(differ)}")
        print("the same bits as before")


if __name__ == "__main__":
    main()
