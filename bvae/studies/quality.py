"""python -m bvae.studies.quality RUN NAME...: precision, recall, density and coverage of priors against the test set.

NAME is `normal` (GEN-1), `second-stage` (GEN-2), another prior that was fitted to the run, or `floor`: as many training
images, with their FID. Samples are rounded to 8 bits, as bvae.sample writes them. The figures go into the run's folder.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from bvae.errors import UserError, run_command
from bvae.files import encode_json, write_atomically
from bvae.machine import pick_device
from bvae.metrics.extract import Extractor
from bvae.metrics.prdc import NEIGHBOURS, prdc
from bvae.metrics.protocols import PROTOCOLS
from bvae.metrics.statistics import Statistics, fid
from bvae.metrics.weights import HELP, find_weights, load_inception
from bvae.run.data import load_data
from bvae.sample import main as sample
from bvae.studies.cells import quality_file, read_json
from bvae.studies.plan import Options
from bvae.two_stage import read_config

CHUNK = 500  # images at a time
STAGES = {"normal": "1", "second-stage": "2"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bvae.studies.quality", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--inception")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="tf1")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num", type=int, default=10_000, help="images on either side")
    args = parser.parse_args(argv)
    weights = find_weights(args.inception)
    if weights is None:
        raise UserError(f"the weights of the FID network are missing: {HELP}")
    network, digest = load_inception(weights, pick_device(args.device), args.precision)
    extractor = Extractor(network, digest, PROTOCOLS[args.protocol])
    options = Options(out=args.run, seeds=1, protocol=args.protocol, precision=args.precision, fid_num=args.num)
    path = quality_file(args.run, options)
    found = read_json(path)
    data = load_data(read_config(args.run))
    real = _statistics(extractor, data.test[: args.num])
    assert real.features is not None
    for name in args.names:
        if name == "floor":
            fake = _statistics(extractor, data.train[: args.num])
        else:
            fake = _statistics(extractor, _samples(args.run, name, args.num, args.device))
        assert fake.features is not None
        if min(len(real.features), len(fake.features)) <= NEIGHBOURS:
            raise UserError(f"precision and recall need more than {NEIGHBOURS} images on either side")
        found[name] = {"fid": fid(real, fake), **prdc(real.features, fake.features)}
        write_atomically(path, encode_json(found, indent=1).encode())


def _samples(run: Path, name: str, num: int, device: str) -> np.ndarray:
    how = ["--stage", STAGES[name]] if name in STAGES else ["--prior", name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "samples.npz"
        sample([str(run), *how, "--num", str(num), "--device", device, "--out", str(out)])
        with np.load(out) as there:
            images: np.ndarray = there["images"]
            return images


def _statistics(extractor: Extractor, images: np.ndarray) -> Statistics:
    """Statistics with features of images uint8 [N,H,W,C]."""
    parts = (torch.as_tensor(np.ascontiguousarray(images[i : i + CHUNK])) for i in range(0, len(images), CHUNK))
    return extractor.statistics(parts, keep=True)


if __name__ == "__main__":
    run_command(main)
