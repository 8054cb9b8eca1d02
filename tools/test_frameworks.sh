#!/usr/bin/env bash
# The loss inside diffusers, Lightning, accelerate and pythae, in a virtual environment of their own beside the project's.
#
#   tools/test_frameworks.sh [--install] [DIR]
#
# DIR keeps the environment for the next run; --install makes it and runs no test.
#
# The environment sees the packages of the project's (.venv, or that of $PYTHON), torch among them: what pip adds must go
# with that torch. torchvision is not among it, and must not come with any of the four.
set -euo pipefail
cd "$(dirname "$0")/.."
install_only=
if [ "${1:-}" = --install ]; then
    install_only=yes
    shift
fi
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    dir=$(realpath "$1")
else
    dir=$(mktemp -d)
    trap 'rm -rf "$dir"' EXIT
fi
python=${PYTHON:-.venv/bin/python}

if [ ! -x "$dir/bin/pytest" ]; then
    "$python" -m venv "$dir"
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n%s\n' "$packages" "$PWD" >"$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/bvae.pth"
    "$python" -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' >"$dir/constraint.txt"
    PIP_CONSTRAINT="$dir/constraint.txt" "$dir/bin/pip" install --quiet --no-compile \
        'diffusers>=0.30' 'lightning>=2.4' 'accelerate>=1' 'pythae>=0.1.2' pytest pytest-timeout
fi
[ -z "$install_only" ] || exit 0
"$dir/bin/python" - <<'PYTHON'
import importlib.util
import bvae, torch
from importlib.metadata import version
assert importlib.util.find_spec("torchvision") is None, "torchvision has come with one of the packages"
names = ("bvae", "torch", "diffusers", "lightning", "accelerate", "pythae")
print(", ".join(f"{name} {bvae.__version__ if name == 'bvae' else version(name)}" for name in names))
PYTHON
"$dir/bin/python" -m pytest -q -p no:cacheprovider tests/frameworks
