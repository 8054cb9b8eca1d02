"""The tables and figures of Asperti & Trentin 2020, without the figures that they print: nobody has verified them."""

from collections.abc import Mapping
from typing import Any

from bvae.studies.kinds import Row, Study
from bvae.studies.published import dai_wipf, rae

SCORES = ("mse_sampled", "rec", "gen1", "gen2", "variance_law", "inactive", "gamma2", "balance", "balance2")
COMPUTED = {"balance": "computed"}
LEARNED = {"balance": "learned"}
FIDS_TEN_TIMES = {"fid_every": 70, "eval_every": 70, "eval_images": 10_000}
"""fid_every holds for both stages, so that stage 2 is scored at twice as many points"""

SHARES = (0.1, 0.2, 0.3, 0.5, 0.7)
_EVOLUTION = (
    *(Row(name=f"{share:.0%} of the epochs", run="all epochs", at=share) for share in SHARES),
    Row(name="all epochs"),
)

TABLE1 = Study(
    name="table1",
    title="Table 1: evolution over the epochs, CIFAR-10",
    about="Rows but the last are read within one training: test mse, REC and GEN-1 after that share of stage 1's "
    "epochs; GEN-2 after that share of stage 2's, always on the final stage 1. Their batch-norm statistics are "
    "recomputed over 50 batches, those of the last row over 300.",
    rows=_EVOLUTION,
    columns=SCORES,
    settings={"preset": "cifar10", **FIDS_TEN_TIMES},
    seeds=10,
)

TABLE2 = Study(
    name="table2",
    title="Table 2: computed against learned gamma and RAE-L2, CIFAR-10",
    about="Computed and learned share one recipe and the seeds. The third row is the recipe by which the paper "
    "repeated Dai & Wipf. RAE-L2 has 128 latents and another network, as in its own paper; it has no second stage, and "
    "is sampled by a Gaussian and by a mixture fitted to its codes.",
    rows=(
        Row(name="computed", settings=COMPUTED, against="learned"),
        Row(name="learned", settings=LEARNED, published=dai_wipf("learned", "cifar10")),
        Row(
            name="learned, Dai & Wipf's epochs",
            settings={**LEARNED, "epochs": 1000, "lr_halve": 300, "epochs2": 2000, "lr_halve2": 600},
            published=dai_wipf("learned", "cifar10"),
        ),
        Row(
            name="RAE-L2",
            settings={"preset": "cifar10-rae", "family": "rae-l2", "epochs2": 0},
            fids={"rec": None},
            priors={"gaussian": None, "gmm": None},
            published=rae("rae-l2", "cifar10", "gen_gaussian"),
        ),
    ),
    columns=(*SCORES[:4], "gen_gaussian", "gen_gmm", *SCORES[4:]),
    settings={"preset": "cifar10"},
)

TABLE3 = Study(
    name="table3",
    title="Table 3: four models, computed against learned gamma, CelebA",
    about="Models 1 to 4 are the presets celeba-1 to celeba-4 (docs/method.md says what each changes).",
    rows=tuple(
        Row(
            name=f"model {n}, {balance}",
            settings={"preset": f"celeba-{n}", "balance": balance},
            against=f"model {n}, learned" if balance == "computed" else "",
        )
        for n in (1, 2, 3, 4)
        for balance in ("computed", "learned")
    ),
    columns=SCORES,
)

_LOWER_LR = {"lr": 5e-5, "lr_halve": 60, "lr2": 5e-5, "lr_halve2": 120}
_L2 = {"l2": 1e-3, "l2_on": ("encoder.downsample", "decoder.upsample")}


def _added() -> tuple[Row, ...]:
    steps: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("computed", COMPUTED),
        ("+ kl_weight 4", {"kl_weight": 4.0}),
        ("+ lr 5e-5", _LOWER_LR),
        ("+ l2", _L2),
    )
    rows = [Row(name="learned", settings=LEARNED, published=dai_wipf("learned", "celeba"))]
    settings: dict[str, Any] = {}
    for name, more in steps:
        settings |= more
        fids = dict.fromkeys(("rec", "gen1", "gen2", *(("gen2_rescaled",) if name == "+ l2" else ())))
        rows.append(Row(name=name, settings=dict(settings), fids=fids, against=rows[-1].name))
    # GEN-1 is rescaled too, and not measured so.
    rescaled = {**{name: name for name in SCORES if name != "gen1"}, "gen2": "gen2_rescaled"}
    return (*rows, Row(name="+ rescale", run="+ l2", read=rescaled, against="+ l2"))


TABLE4 = Study(
    name="table4",
    title="Table 4: the paper's CelebA recipe, one change after the other",
    about="Each row adds one change to the row above and is compared with it; the last is the preset `celeba`. "
    "Rescaling acts on sampling alone: its row reads the runs of the row above.",
    rows=_added(),
    columns=SCORES,
    settings={"preset": "celeba-1"},
)

RATES = ("5e-4", "2e-4", "1e-4", "5e-5", "2.5e-5")
TABLE5 = Study(
    name="table5",
    title="Table 5: learning rates and inactive latents, CIFAR-10",
    about="The learning rate of stage 1 alone differs.",
    rows=tuple(
        Row(name=f"lr {rate}", settings={"lr": float(rate)}, against="lr 1e-4" if rate != "1e-4" else "")
        for rate in RATES
    ),
    columns=("inactive", "mse_sampled", "kl", "rec", "gen1", "gen2", "variance_law", "gamma2", "balance", "balance2"),
    settings={"preset": "cifar10"},
)

FIG2 = Study(
    name="fig2",
    title="Fig. 2: FIDs over the epochs, CIFAR-10",
    about="Mean and standard deviation of the trainings. GEN-2 is of the second stage on the final first one, over "
    "twice the epochs. All trainings count, those with other numbers of active latents too.",
    rows=(Row(name="computed"),),
    columns=SCORES,
    settings={"preset": "cifar10", **FIDS_TEN_TIMES},
    seeds=10,
    picture="fids",
)

FIG3 = Study(
    name="fig3",
    title="Fig. 3: faces",
    about="Samples of seed 0 by the second stage, chosen by nobody.",
    rows=(Row(name="celeba"),),
    columns=SCORES,
    settings={"preset": "celeba"},
    seeds=1,
    picture="samples",
)

FIRST_EPOCH = {"epochs": 1, "epochs2": 0, "eval_every": 0, "bn_batches": 20}
LATENTS = ("mse_sampled", "kl", "inactive", "active", "gamma2", "balance")
FIG4 = Study(
    name="fig4",
    title="Fig. 4: variance of the latents of a dense VAE over the first epoch, MNIST",
    about="Each point is the mean of E(sigma^2) over the steps since the point before it.",
    rows=(Row(name="mlp", settings={"network": "mlp"}, fids={}, moments=25),),
    columns=LATENTS,
    settings={"preset": "mnist", **FIRST_EPOCH},
    seeds=1,
    picture="first epoch",
)

FIG5 = Study(
    name="fig5",
    title="Fig. 5: variance of the 64 latents over the first epoch, CIFAR-10",
    about="Each point is the mean of E(sigma^2) over the steps since the point before it.",
    rows=(Row(name="computed", fids={}, moments=25),),
    columns=LATENTS,
    settings={"preset": "cifar10", **FIRST_EPOCH},
    seeds=1,
    picture="first epoch",
)

FIG6 = Study(
    name="fig6",
    title="Fig. 6: variance of the 64 latents over the first 50 epochs, CIFAR-10",
    about="The latents of seed 0; the number of inactive ones is the mean of all seeds.",
    rows=(Row(name="computed", fids={}),),
    columns=LATENTS,
    settings={"preset": "cifar10", "epochs": 50, "epochs2": 0},
    seeds=3,
    picture="latents",
)

FIG7 = Study(
    name="fig7",
    title="Fig. 7: filters of the resize, CelebA",
    about="The first images of --data, cropped to 128 pixels and resized to 64. Nothing is trained.",
    rows=(),
    columns=(),
    seeds=1,
    picture="filters",
)

STUDIES = (TABLE1, TABLE2, TABLE3, TABLE4, TABLE5, FIG2, FIG3, FIG4, FIG5, FIG6, FIG7)
