"""CelebA (img_align_celeba.zip, Kaggle's archive, a folder, ...) into a prepared store, as the paper has it.

The centred square of 128 pixels, rows 45:173 and columns 25:153, resized to 64 with an antialiasing bilinear filter;
split by list_eval_partition.txt, which is looked for in the archive and beside it. Papers also use --crop 140, 148,
178 and none: see docs/prepare.md.
"""

from bvae.data import prep
from bvae.errors import run_command


def main(argv: list[str] | None = None, *, prog: str = "python -m bvae.data.prep_celeba") -> None:
    prep.main(argv, prog=prog, description=__doc__, size=64, crop=128)


if __name__ == "__main__":
    run_command(main)
