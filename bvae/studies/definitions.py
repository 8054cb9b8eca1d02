"""All studies by name."""

from bvae.errors import UserError
from bvae.studies import beyond, evidence, paper
from bvae.studies.kinds import Study

STUDIES: dict[str, Study] = {study.name: study for study in (*paper.STUDIES, *beyond.STUDIES, *evidence.STUDIES)}


def find_study(name: str) -> Study:
    try:
        return STUDIES[name]
    except KeyError:
        raise UserError(f"{name}: there is no such study; choose from {', '.join(STUDIES)}") from None
