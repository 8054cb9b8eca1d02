#!/usr/bin/env python3
"""The Frechet Inception distance: `python -m bvae.fid` by another name."""

from bvae.errors import run_command
from bvae.fid import LESS_MEMORY, main

if __name__ == "__main__":
    run_command(main, LESS_MEMORY)
