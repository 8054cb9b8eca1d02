"""python -m bvae.evaluate: measures a trained model on a test set."""

import argparse
import sys
from pathlib import Path
from typing import Any

from bvae.batches import to_device
from bvae.datasource import load_data
from bvae.errors import UserError, run_command
from bvae.files import encode_json, write_atomically
from bvae.machine import pick_device
from bvae.scores import encode_images, score_images, score_latents
from bvae.two_stage import load, read_run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bvae.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, or one that save_pretrained wrote")
    parser.add_argument("--data", help="images as for training; by default what the run was trained on")
    parser.add_argument("--num", type=int, help="use only the first so many test images")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    if args.num is not None and args.num < 1:
        raise UserError(f"--num must be at least 1, not {args.num}")

    model = load(args.run, checkpoint=args.checkpoint, device=pick_device(args.device))
    c = model.config
    data = load_data(c, args.data)
    trained_on = read_run(args.run).get("data", {}).get("digest")
    if trained_on not in (None, data.digest):
        print(f"note: {data.name} is not the data this run was trained on", file=sys.stderr)

    images = to_device(data.test[: args.num], model.device)
    figures: dict[str, Any] = {"data": data.name, "images": len(images)}
    figures["stage1"] = score_images(model.stage1, images, c.seed).figures
    if model.stage2 is not None:
        figures["stage2"] = score_latents(model.stage2, encode_images(model.stage1, images), c.seed).figures
    print(encode_json(figures, indent=2))
    if args.json:
        write_atomically(args.json, encode_json(figures, indent=2).encode())


if __name__ == "__main__":
    run_command(main)
