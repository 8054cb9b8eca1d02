#!/usr/bin/env bash
# The decoders' tests with DALI and with pillow-simd, each in a virtual environment of its own. Neither needs torch.
#
#   tools/test_backends.sh [--install] [DIR]
#
# DIR keeps the environments, for bench_prep.py's --python or the next run; --install makes them and runs no test.
#
# pillow-simd is built here: Debian's gcc, zlib1g-dev and libjpeg62-turbo-dev are needed, and a processor with AVX2.
# libwebp-dev and libtiff-dev add those formats; without them their images are rejected, and their tests skip.
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
needs=(numpy pytest pytest-timeout hypothesis)

make_dali() {
    "${PYTHON:-python3}" -m venv "$dir/dali"
    "$dir/dali/bin/pip" install --quiet --no-compile "${needs[@]}" pillow 'nvidia-dali-cuda130>=2.0'
}

make_simd() {
    "${PYTHON:-python3}" -m venv "$dir/simd"
    "$dir/simd/bin/pip" install --quiet --no-compile "${needs[@]}"
    CC="cc -mavx2" "$dir/simd/bin/pip" install --quiet --no-binary :all: --force-reinstall --no-deps pillow-simd
}

[ -x "$dir/simd/bin/pytest" ] || make_simd &
[ -x "$dir/dali/bin/pytest" ] || make_dali
wait $!
[ -z "$install_only" ] || exit 0

for names in dali:dali:dali-cpu simd:pillow:pillow-simd; do
    IFS=: read -r environment backend name <<<"$names"
    python="$dir/$environment/bin/python"
    "$python" -c "
from bvae.data.decoders import open_decoder
from bvae.data.recipe import Recipe
with open_decoder('$backend', Recipe(size=64, channels=3), device='cpu') as decoder:
    print(f'{decoder.name}: {decoder.versions}; {decoder.why}')
    assert decoder.name == '$name'"
    "$python" -m pytest -q --noconftest -p no:cacheprovider -m 'not gpu' tests/data/test_decoders*.py tests/data/test_recipe.py
done
