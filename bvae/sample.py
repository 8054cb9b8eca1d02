"""python -m bvae.sample: draws images from a trained model."""

import argparse
import io
from pathlib import Path

import numpy as np

from bvae.errors import UserError, run_command
from bvae.files import write_atomically
from bvae.machine import pick_device
from bvae.report import figures
from bvae.run.folder import load
from bvae.run.priors import check_name, sample_latents
from bvae.two_stage import to_uint8

MOST = 1_000_000  # images of one call: they are held in memory


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bvae.sample", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, or one that save_pretrained wrote")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="1: z from N(0,I); 2: z from stage 2 (the default)")
    parser.add_argument(
        "--prior", help="draw z from this prior: normal, second-stage, or one that bvae.prior has fitted"
    )
    parser.add_argument("--num", type=positive, default=100, help="number of images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=positive, default=10, help="columns of the grid")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--out", type=Path, default=Path("samples.png"), help=".png: a grid; .npz: `images`, uint8 [N,H,W,C]"
    )
    args = parser.parse_args(argv)
    if args.out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {args.out}: must end in .png or .npz")
    if args.prior is not None:
        if args.stage is not None:
            raise UserError("--stage and --prior contradict each other: both say where z comes from")
        check_name(args.prior)
    model = load(args.run, checkpoint=args.checkpoint, device=pick_device(args.device))
    if args.num > MOST:
        raise UserError(f"--num {args.num}: at most {MOST} at a time; another --seed draws others")
    if args.prior is None:
        stage = args.stage or 2
        images, origin = to_uint8(model.sample(args.num, stage, args.seed)), f"stage {stage}"
    else:
        z = sample_latents(args.run, model, args.prior, args.num, args.seed)
        images, origin = to_uint8(model.decode(z)), f"the prior {args.prior}"
    if args.out.suffix == ".png":
        figures.save_png(args.out, figures.image_grid(images, args.columns))
    else:
        data = io.BytesIO()
        np.savez_compressed(data, images=images)
        write_atomically(args.out, data.getvalue())
    print(f"{args.num} images of {origin}: {args.out}")


if __name__ == "__main__":
    run_command(main)
