"""Stands in for the commands of a study's cells: leaves the same files as they do, at once.

fake_run.py MODULE ARGUMENT...; figures depend on balance, beta and seed alone. FAKE_SECONDS: what an epoch takes.
FAKE_FAIL: a balance whose training fails at its end. Every call adds a line to FAKE_CALLS.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

DATA = {"name": "fake", "path": "p", "digest": "sha256:d", "train": 400, "test": 100}


def train(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--balance", default="computed")
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=3)
    args, _ = parser.parse_known_args(argv)
    run = args.resume or args.out
    if args.out:
        if run.exists():
            sys.exit(f"error: {run}: exists already")
        (run / "checkpoints").mkdir(parents=True)
        config = {"balance": args.balance, "seed": args.seed, "beta": args.beta, "epochs": args.epochs, "batch": 100}
        (run / "config.json").write_text(
            json.dumps({"config": config, "data": DATA, "device": "fake", "versions": {"bvae": "0"}})
        )
    c = json.loads((run / "config.json").read_text())["config"]
    quality = {"computed": 1.0, "learned": 1.2, "fixed": 1.0 + 10 * c["beta"]}[c["balance"]] + 0.01 * c["seed"]
    done = len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
    for epoch in range(done + 1, c["epochs"] + 1):
        time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
        balance = 0.4 if c["balance"] == "learned" and os.environ.get("FAKE_UNSETTLED") else 0.5
        record = {"stage": 1, "epoch": epoch, "mse": quality / epoch, "kl": 3.0, "gamma2": 0.01, "balance": balance}
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({**record, "latent_sigma2": [0.1, 0.9]}) + "\n")
    if os.environ.get("FAKE_FAIL") == c["balance"]:
        print("Traceback", file=sys.stderr)
        print("error: its weights have diverged", file=sys.stderr)
        sys.exit(2)
    first = {"mse_sampled": 0.01 * quality, "kl": 3.0, "variance_law": 1.0, "inactive": 1, "active": 1}
    write(run, {"stage1": {**first, "gamma2": 0.01 + 0.001 * c["seed"]}})


def evaluate(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--fid-num", type=int)
    parser.add_argument("--precision")
    parser.add_argument("--prior")
    args, _ = parser.parse_known_args(argv)
    results = json.loads((args.run / "results.json").read_text())
    mse = results["stage1"]["mse_sampled"]
    fids = results.setdefault("fid", {}).setdefault("tf1", {"n": args.fid_num, "precision": args.precision})
    fids |= {
        name: 1000 * mse + 5 * len(name)
        for name in (*args.only, *(f"gen_{p}" for p in (args.prior or "").split(",") if p))
    }
    write(args.run, results)


def prior(argv: list[str]) -> None:
    path = Path(argv[0], "priors", f"{argv[1]}.safetensors")
    path.parent.mkdir(exist_ok=True)
    path.touch()


def sample(argv: list[str]) -> None:
    Path(argv[argv.index("--out") + 1]).write_bytes(b"a picture")


def quality(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--num")
    args, _ = parser.parse_known_args(argv)
    found = {name: {"precision": 0.5, "recall": 0.4, "density": 0.6, "coverage": 0.7} for name in args.names}
    found["floor"]["fid"] = 2.5
    (args.run / f"quality-tf1-fp32-{args.num}.json").write_text(json.dumps(found))


def write(run: Path, results: dict) -> None:
    (run / "results.tmp").write_text(json.dumps(results))
    os.replace(run / "results.tmp", run / "results.json")


if __name__ == "__main__":
    if "FAKE_CALLS" in os.environ:
        with open(os.environ["FAKE_CALLS"], "a") as calls:
            calls.write(" ".join(sys.argv[1:]) + "\n")
    commands = {
        "bvae.train": train,
        "bvae.evaluate": evaluate,
        "bvae.prior": prior,
        "bvae.sample": sample,
        "bvae.studies.quality": quality,
    }
    commands[sys.argv[1]](sys.argv[2:])
