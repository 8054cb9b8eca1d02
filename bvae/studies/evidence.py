"""The studies whose figures the project keeps (benchmarks/results/studies, docs/results.md): small enough for a CPU."""

from bvae.studies.beyond import AT_COMPUTED, EX_POST, FIXED, balance_rows
from bvae.studies.kinds import Row, Study
from bvae.studies.published import dai_wipf

GEN2_OF_ALL = {"gen2": None, "rec": 2, "gen1": 2}
COLUMNS = (
    "mse_sampled",
    "kl",
    "rec",
    "gen1",
    "gen2",
    *(f"gen_{name}" for name in EX_POST),
    "fid",
    "variance_law",
    "inactive",
    "gamma2",
    "balance",
    "balance2",
)

FASHION = Study(
    name="evidence-fashion",
    title="Fashion-MNIST: computed, learned and fixed gamma, and priors",
    about="InfoGAN's network, 10 + 20 epochs at lr 1e-3 (`fashion-short`): a recipe of its own, not a scaled one. FID "
    "of 10,000 samples against the 10,000 test images, 28x28 grey. Dai & Wipf's figures are of 400 + 800 epochs under "
    "their own protocol, which stretches each image.",
    rows=(
        Row(
            name="computed",
            settings={"balance": "computed"},
            fids=GEN2_OF_ALL,
            priors=dict.fromkeys(EX_POST, 3),
            quality={"floor": 1},
            against="learned",
        ),
        Row(
            name="learned",
            settings={"balance": "learned"},
            fids=GEN2_OF_ALL,
            published=dai_wipf("learned", "fashion"),
        ),
        Row(name="fixed at computed's gamma2", settings=AT_COMPUTED, fids=GEN2_OF_ALL, seeds=3, against="computed"),
        Row(
            name="fixed gamma 1",
            settings={**FIXED, "gamma": 1.0},
            fids=GEN2_OF_ALL,
            seeds=1,
            published=dai_wipf("fixed", "fashion"),
        ),
        Row(name="real training images", run="computed", read={"fid": "floor/fid"}, seeds=1),
    ),
    columns=COLUMNS,
    settings={"preset": "fashion-short"},
    precision="bf16",
)

MNIST = Study(
    name="evidence-mnist",
    title="MNIST: computed against learned gamma",
    about="As evidence-fashion, by `mnist-short`.",
    rows=(
        Row(name="computed", settings={"balance": "computed"}, fids=GEN2_OF_ALL, against="learned"),
        Row(
            name="learned",
            settings={"balance": "learned"},
            fids=GEN2_OF_ALL,
            published=dai_wipf("learned", "mnist"),
        ),
    ),
    columns=tuple(name for name in COLUMNS if not name.startswith("gen_")),
    settings={"preset": "mnist-short"},
    seeds=3,
    precision="bf16",
)

SHAPES = Study(
    name="evidence-shapes",
    title="Shapes: every balance against eight true factors",
    about="Stage 1 alone, 10,000 images, 5 epochs, base 8. Batches of 16, so that 3,125 steps at lr 1e-3 let a "
    "learned gamma come down: it moves by at most lr a step. The images have eight true factors; factor correlation is "
    "the mean over them of the largest correlation with a latent.",
    rows=balance_rows(fids={}),
    columns=("mse_sampled", "kl", "active", "factor_correlation", "variance_law", "gamma2", "balance"),
    settings={
        "preset": "shapes",
        "data": "shapes",
        "shapes_train": 10_000,
        "base": 8,
        "batch": 16,
        "epochs": 5,
        "lr_halve": 5,
        "epochs2": 0,
        "kl_weight": 1.0,
    },
    judged=("mse_sampled", "kl", "factor_correlation"),
)

STUDIES = (FASHION, MNIST, SHAPES)
