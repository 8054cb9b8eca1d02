"""python -m bvae.evaluate: measures a trained model on a test set.

Reconstruction error, KL, variance law and inactive latents; and where the weights of the FID Inception are at hand, the
FIDs of reconstructions and of both stages' samples. The figures of a run on its own data join its results.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bvae.batches.resident import chunks, to_device
from bvae.errors import UserError, run_command
from bvae.files import encode_json, write_atomically
from bvae.machine import pick_device
from bvae.metrics.cache import Cache, default_folder
from bvae.metrics.extract import Extractor
from bvae.metrics.fid_scores import NUM, FIDScorer
from bvae.metrics.likelihood import active_units, importance_likelihood
from bvae.metrics.protocols import DEFAULT, PROTOCOLS
from bvae.metrics.scores import encode_images, score_images, score_latents
from bvae.metrics.weights import HELP, find_weights, load_inception
from bvae.models.priors.normal import standard_normal_log_prob
from bvae.run.data import load_data
from bvae.run.display import following
from bvae.run.folder import Run, load
from bvae.run.priors import check_name, sample_latents
from bvae.two_stage import TwoStageVAE, read_run

RESULTS = "results.json"
PARTS = ("rec", "rec_mean", "gen1", "gen2", "gen2_rescaled")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bvae.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, or one that save_pretrained wrote")
    parser.add_argument("--data", help="images as for training; by default what the run was trained on")
    parser.add_argument("--num", type=int, help="use only the first NUM test images")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--nll", type=int, metavar="K", help="also the test NLL by importance sampling with K samples")
    group = parser.add_argument_group("FID")
    group.add_argument("--inception", help="the network's weights, or `download`")
    group.add_argument("--no-fid", action="store_true", help="leave the FIDs out")
    group.add_argument("--protocol", choices=PROTOCOLS, default=DEFAULT)
    group.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the Inception network"
    )
    group.add_argument(
        "--fid-num", type=int, default=NUM, help="number of generated images and, at most, of test images"
    )
    group.add_argument("--only", nargs="*", choices=PARTS, help="measure these alone; nothing: --prior alone")
    group.add_argument("--rec", choices=("both", "sampled", "mean"), default="both", help="how latents are decoded")
    group.add_argument("--contrast", action="store_true", help="restore the contrast of reconstructions before REC")
    group.add_argument("--prior", help="also FIDs of samples of these priors: names with commas between")
    group.add_argument("--allow-few", action="store_true", help="measure fewer than 2048 images too, and label it")
    group.add_argument("--batch-size", type=int, help="images through the Inception at a time")
    args = parser.parse_args(argv)
    for name in ("num", "fid_num", "batch_size", "nll"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    model = load(args.run, checkpoint=args.checkpoint, device=pick_device(args.device))
    c = model.config
    priors = args.prior.split(",") if args.prior else []
    for name in priors:
        check_name(name)
        sample_latents(args.run, model, name, 1, 0)  # is there one, of these weights?
    if args.nll and model.stage1.deterministic:
        raise UserError(f"--nll: the codes of --family {c.family} are deterministic: the likelihood cannot be bounded")
    # Weights must be there, and be the right ones, before anything takes time.
    weights = None if args.no_fid else find_weights(args.inception)
    if weights is None and not args.no_fid:
        print(f"note: no FID, since the weights of its network are missing: {HELP}", file=sys.stderr)
    extractor = None
    if weights is not None:
        network, digest = load_inception(weights, model.device, args.precision)
        extractor = Extractor(network, digest, PROTOCOLS[args.protocol], args.batch_size)
    data = load_data(c, args.data)
    trained_on = read_run(args.run).get("data", {}).get("digest")
    own = trained_on in (None, data.digest)
    if not own:
        print(f"note: {data.name} is not the data this run was trained on", file=sys.stderr)

    images = to_device(data.test[: args.num], model.device)
    figures: dict[str, Any] = {"data": data.name, "images": len(images)}
    figures["stage1"] = score_images(model.stage1, images, c.seed).figures
    if model.stage2 is not None:
        figures["stage2"] = score_latents(model.stage2, encode_images(model.stage1, images), c.seed).figures
    posterior = encode_images(model.stage1, images)
    figures["active_units"] = active_units(posterior.mu)
    if args.nll:
        prior = model.stage1.prior
        likelihood = importance_likelihood(
            model.decode,
            posterior,
            (target for _, target in chunks(images)),
            _gamma2(args.run),
            samples=args.nll,
            seed=c.seed,
            log_prior=standard_normal_log_prob if prior is None else prior.density(model.stage1.encoder),
        )
        figures["likelihood"] = likelihood.figures()
    if extractor is not None:
        with following() as follow:
            scorer = FIDScorer(
                extractor, images, args.fid_num, args.allow_few, Cache(default_folder()), progress=follow
            )
            names = parts(args.rec) if args.only is None else args.only
            figures["fid"] = {args.protocol: fid_figures(model, scorer, names, args.contrast)}
            for name in priors:
                z = sample_latents(args.run, model, name, args.fid_num, c.seed)
                figures["fid"][args.protocol][f"gen_{name}"] = scorer.of_latents(model, z, f"GEN, {name}")
    print(encode_json(figures, indent=2))
    if args.json:
        write_atomically(args.json, encode_json(figures, indent=2).encode())
    if own and args.checkpoint == "last":
        extend_results(args.run / RESULTS, figures, whole=len(images) == len(data.test))


def _gamma2(folder: Path) -> float:
    """The decoder's variance, of a run's results."""
    try:
        return float(Run(folder).results["stage1"]["gamma2"])
    except (KeyError, TypeError):
        raise UserError(f"--nll: {folder} has no results.json with stage 1's gamma2: the likelihood needs it") from None


def parts(rec: str) -> list[str]:
    """All FIDs, those of reconstructions as --rec says."""
    left_out = {"both": "", "sampled": "rec_mean", "mean": "rec"}[rec]
    return [name for name in PARTS if name != left_out]


def fid_figures(model: TwoStageVAE, scorer: FIDScorer, names: Sequence[str], contrast: bool) -> dict[str, Any]:
    """The FIDs in `names`, of PARTS; None for GEN-2 of a model without a second stage."""
    seed = model.config.seed
    found: dict[str, Any] = scorer.about()
    for name in names:
        if name.startswith("rec"):
            found[name + "_contrast" * contrast] = scorer.reconstructed(model, seed, name == "rec", contrast)
        elif name == "gen1":
            found[name] = scorer.generated(model, 1, seed, rescale=False)
        else:
            rescaled = name == "gen2_rescaled"
            found[name] = None if model.stage2 is None else scorer.generated(model, 2, seed, rescale=rescaled)
    return found


def extend_results(path: Path, figures: dict[str, Any], whole: bool) -> None:
    """Adds the FIDs to a run's results, and the stages' figures where it has none; changes nothing else in them.

    Figures under a protocol join those that are there where both are of the same images, weights and precision, and
    replace them otherwise. `whole`: the stages' figures are of the whole test set.
    """
    try:
        results = json.loads(path.read_text())
    except FileNotFoundError:
        results = {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): the figures were not added to it") from error
    if not isinstance(results, dict) or not isinstance(results.get("fid", {}), dict):
        raise UserError(f"{path}: not the results of a run: the figures were not added to it")
    for name in ("stage1", "stage2"):
        if name in figures and whole:
            results.setdefault(name, figures[name])
    for protocol, found in figures.get("fid", {}).items():
        there = results.setdefault("fid", {}).get(protocol, {})
        same = all(there.get(name) == found[name] for name in ("n", "n_reference", "precision", "weights"))
        results["fid"][protocol] = (there if same else {}) | found
    write_atomically(path, encode_json(results, indent=2).encode())


if __name__ == "__main__":
    run_command(main)
