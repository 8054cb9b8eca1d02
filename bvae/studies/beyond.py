"""Studies beyond the paper: other papers' tables, and the controls that the paper lacks."""

from bvae.studies.kinds import FromRow, Row, Study
from bvae.studies.published import DATA_SETS, dai_wipf, rae

FIXED = {"balance": "fixed"}
BETAS = ("0.1", "0.03", "0.01", "0.003", "0.001")
"""betas of the sweep: from above to below every gamma2 that the presets end with"""

_PRESETS = {"mnist": "mnist", "fashion": "fashion", "cifar10": "cifar10-infogan", "celeba": "celeba-infogan"}


def _table_of_dai_wipf(data: str) -> tuple[Row, ...]:
    def row(name: str, key: str, one_stage: bool = False, **settings: object) -> Row:
        return Row(
            name=f"{data}: {name}",
            data=data,
            settings={"preset": _PRESETS[data], **settings, **({"epochs2": 0} if one_stage else {})},
            fids=dict.fromkeys(("rec", "gen1") if one_stage else ("rec", "gen1", "gen2")),
            published=dai_wipf(key, data),
            against=f"{data}: learned" if name == "computed" else "",
        )

    return (
        row("fixed gamma 1", "fixed", True, balance="fixed", gamma=1.0),
        row("WAE-MMD", "wae-mmd", True, family="wae-mmd"),
        row("learned", "learned", balance="learned"),
        row("computed", "computed", balance="computed"),
    )


DAI_WIPF = Study(
    name="dai-wipf",
    title="Dai & Wipf's Table 1, with computed gamma beside it",
    about="Their network (InfoGAN's), k 64, on four data sets: name them with --data NAME=PATH, once for each, or give "
    "a folder that holds them by name. Data sets that are not given are left out.",
    rows=tuple(row for data in DATA_SETS for row in _table_of_dai_wipf(data)),
    columns=("mse_sampled", "rec", "gen1", "gen2", "variance_law", "inactive", "gamma2", "balance", "balance2"),
)

_FIXED_GAMMA2 = {"mnist": 0.156, "cifar10": 0.036, "celeba": 0.135}
"""gamma2 that the baselines of Ghosh et al. amount to: C * kw / 2 from their code's weights"""


def _table_of_rae(data: str) -> tuple[Row, ...]:
    preset = {"preset": f"{data}-rae"}
    weak = {**FIXED, "beta": _FIXED_GAMMA2[data]}

    def deterministic(name: str, family: str) -> Row:
        return Row(
            name=f"{data}: {name}",
            data=data,
            settings={**preset, "family": family, "epochs2": 0},
            fids={"rec": None},
            priors={"gaussian": None, "gmm": None},
            published=rae(family, data, "gen_gaussian"),
        )

    return (
        Row(
            name=f"{data}: VAE",
            data=data,
            settings={**preset, "family": "vae", **weak, "epochs2": 0},
            fids={"rec": None, "gen1": None},
            priors={"gmm": None},
            published=rae("vae", data, "gen1"),
        ),
        Row(
            name=f"{data}: two-stage VAE",
            data=data,
            settings={**preset, "family": "vae", **weak},
            fids={"rec": None, "gen2": None},
            published=rae("2svae", data, "gen2"),
        ),
        Row(
            name=f"{data}: WAE-MMD",
            data=data,
            settings={**preset, "family": "wae-mmd", "epochs2": 0},
            fids={"rec": None, "gen1": None},
            priors={"gmm": None},
            published=rae("wae-mmd", data, "gen1"),
        ),
        deterministic("RAE-GP", "rae-gp"),
        deterministic("RAE-L2", "rae-l2"),
        deterministic("RAE-SN", "rae-sn"),
        deterministic("AE", "ae"),
        Row(
            name=f"{data}: computed",
            data=data,
            settings={**preset, "family": "vae", "balance": "computed"},
            priors={"gaussian": None, "gmm": None},
            against=f"{data}: two-stage VAE",
        ),
    )


RAE = Study(
    name="rae",
    title="Table 1 of regularised autoencoders (Ghosh et al. 2020), with computed gamma beside it",
    about="Their networks and sizes of the latent space. Their VAE weighs the KL as a fixed gamma2 of .156, .036 and "
    ".135 would, far above that of a balanced one; the rows here have just that. Data sets as in dai-wipf.",
    rows=tuple(row for data in ("mnist", "cifar10", "celeba") for row in _table_of_rae(data)),
    columns=("mse_sampled", "rec", "gen1", "gen2", "gen_gaussian", "gen_gmm", "inactive", "gamma2", "balance"),
    seeds=3,
)

AT_COMPUTED = {**FIXED, "beta": FromRow("computed", "gamma2")}

_OTHERS = tuple(
    Row(name=name, settings={"balance": name}, against="computed") for name in ("optimal", "annealed", "free-bits")
)


def balance_rows(**common: object) -> tuple[Row, ...]:
    """Every balance; what has no target of its own is given what the computed run has found."""
    rows = (
        Row(name="computed", settings={"balance": "computed"}),
        Row(name="learned", settings={"balance": "learned"}, against="computed"),
        Row(name="fixed at computed's gamma2", settings=AT_COMPUTED, against="computed"),
        Row(name="fixed gamma 1", settings={**FIXED, "gamma": 1.0}, against="computed"),
        *_OTHERS,
        *(
            Row(name=name, settings={"balance": name, target: FromRow("computed", metric)}, against="computed")
            for name, target, metric in (
                ("geco", "geco_target", "gamma2"),
                ("capacity", "capacity_kl", "kl"),
                ("controlvae", "controlvae_kl", "kl"),
            )
        ),
    )
    return tuple(_with(row, common) for row in rows)


def _with(row: Row, common: dict[str, object]) -> Row:
    return Row(**{**row.__dict__, **common})


SCORES = (
    "mse_sampled",
    "kl",
    "rec",
    "gen1",
    "gen2",
    "variance_law",
    "inactive",
    "gamma2",
    "balance",
    "balance2",
)
BALANCES = Study(
    name="balances",
    title="Every balance on one data set",
    about="kl_weight is 1 in all rows. `fixed` at the final gamma2 of the computed run of the same seed shows whether "
    "following the error matters or only where it ends; the five betas are a sweep as a user would make it: computed "
    "should equal the best of them without having searched. geco's target is the error of the computed run, "
    "that of capacity and controlvae its KL; other settings have their defaults. Another data set: --data and --set "
    "preset=NAME.",
    rows=(
        *balance_rows(),
        *(
            Row(name=f"fixed beta {beta}", settings={**FIXED, "beta": float(beta)}, against="computed")
            for beta in BETAS
        ),
    ),
    columns=SCORES,
    settings={"preset": "fashion-short", "kl_weight": 1.0},
)

QUALITY = ("precision", "recall", "density", "coverage")
EX_POST = ("gaussian", "gmm", "flow-matching")


def _prior_row(name: str, metric: str, run: str, seeds: int | None = None, quality: bool = True) -> Row:
    read = {"fid": metric, metric: metric, **({q: f"{name}/{q}" for q in QUALITY} if quality else {})}
    return Row(name=name, run=run, read=read, seeds=seeds, against="" if name == "normal" else "normal")


PRIORS = Study(
    name="priors",
    title="Every prior on one frozen stage 1",
    about="Priors are fitted to the posterior of the training set and scored against test images. `real training "
    "images` is the floor: as many images of the training set against the test set. `reconstructions` is the bound "
    "for a prior that hits the posterior exactly.",
    rows=(
        Row(
            name="reconstructions",
            priors=dict.fromkeys(EX_POST),
            quality=dict.fromkeys(("normal", "second-stage", *EX_POST, "floor")),
            read={"fid": "rec"},
        ),
        _prior_row("normal", "gen1", "reconstructions"),
        _prior_row("second-stage", "gen2", "reconstructions"),
        *(_prior_row(name, f"gen_{name}", "reconstructions") for name in EX_POST),
        Row(
            name="real training images",
            run="reconstructions",
            read={name: f"floor/{name}" for name in ("fid", *QUALITY)},
        ),
    ),
    columns=("fid", *QUALITY),
    settings={"preset": "fashion-short"},
    judged=("fid",),
    seeds=3,
)

KL_WEIGHT = Study(
    name="kl-weight",
    title="The weight of the KL on CelebA",
    about="The paper multiplies the KL by 4 where the image's side doubles and the latents stay (kl_weight `auto`).",
    rows=tuple(
        Row(name=f"kl_weight {w:g}", settings={"kl_weight": float(w)}, against="kl_weight 1" if w != 1 else "")
        for w in (1, 2, 4, 8)
    ),
    columns=SCORES,
    settings={"preset": "celeba-1"},
    seeds=3,
)

STUDIES = (DAI_WIPF, RAE, BALANCES, PRIORS, KL_WEIGHT)
