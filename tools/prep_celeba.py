"""CelebA into a prepared store, as the paper has it: `python -m bvae.data.prep --preset celeba` by another name."""

from bvae.data import prep
from bvae.errors import run_command


def main(argv: list[str] | None = None) -> None:
    prep.main(argv, prog="python tools/prep_celeba.py", preset="celeba")


if __name__ == "__main__":
    run_command(main, prep.LESS_MEMORY)
