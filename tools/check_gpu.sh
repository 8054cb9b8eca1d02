#!/usr/bin/env bash
# Everything that only a machine with a GPU can tell, in one go, with a short table last. Exit code 1 where a row failed.
#
#   tools/check_gpu.sh OUT [CIFAR10]     OUT: a new folder for logs and results; CIFAR10: the official files
#
# Uses the python on the PATH, which must have torch with CUDA and bvae's dependencies; installs nothing.
#   BVAE_CUDA_ARCHS=90   compile for one architecture only
#   DEVICE=cpu           try the script itself on a machine without a GPU
#   STEPS=20000          steps of each stage of the CIFAR-10 run
#   BVAE_INCEPTION=FILE  the weights of the FID network: its speed, and the FIDs of the CIFAR-10 runs, end to end
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: tools/check_gpu.sh OUT [CIFAR10]}
cifar=${2:-}
device=${DEVICE:-cuda}
steps=${STEPS:-20000}
mkdir -p "$out" && out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
table=()
failed=0

run() { # NAME COMMAND...: runs it into OUT/NAME.log and notes how it ended
    local name=$1 started=$SECONDS code=0
    shift
    echo "== $name: $*"
    "$@" >"$out/$name.log" 2>&1 || code=$?
    [ $code = 0 ] || failed=1
    table+=("$(printf '%-24s %-10s %5d s   %s' "$name" "$([ $code = 0 ] && echo ok || echo "FAILED $code")" \
        $((SECONDS - started)) "$(grep -v '^$' "$out/$name.log" | tail -n 1 | cut -c1-90)")")
}

run build python setup.py build_ext --inplace
run info python -m bvae.info
if [ "$device" = cuda ]; then
    run collect python -m pytest -q --collect-only -m gpu
    # A process for each file: an error of CUDA's stays in a process, and would fail every test after it.
    for file in $(sed -n 's/^\(tests.*\.py\)::.*/\1/p' "$out/collect.log" | sort -u); do
        run "$(basename "$file" .py)" python -m pytest -q -m gpu "$file"
    done
    for tool in memcheck racecheck; do
        for name in test_ops test_ops_large; do
            # Without caching each tensor is an allocation of its own, whose bounds memcheck knows.
            run "${tool}_$name" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool \
                --error-exitcode 9 python -m pytest -q -m gpu -k "float64_twin or gather or empty or 513" "tests/$name.py"
        done
    done
fi
run bench_kernels python tools/bench_kernels.py --device "$device" --json "$out/bench_kernels.json"
run bench_stream python tools/bench_stream.py --device "$device" --steps $([ "$device" = cuda ] && echo 500 || echo 20) \
    --json "$out/bench_stream.json"
run bench_train python tools/bench_train.py --device "$device" --json "$out/bench_train.json"
if [ -n "${BVAE_INCEPTION:-}" ]; then
    run bench_fid python tools/bench_fid.py --device "$device" --json "$out/bench_fid.json"
fi
run precision python tools/check_precision.py --compile --device "$device" --json "$out/check_precision.json"
run shapes python -m bvae.train --device "$device" --out "$out/shapes"
if [ -n "$cifar" ]; then
    run cifar10 python -m bvae.train --preset cifar10 --data "$cifar" --amp --device "$device" --out "$out/cifar10" \
        --max-steps "$steps"
    run compiled python -m bvae.train --preset cifar10 --data "$cifar" --amp --compile --device "$device" \
        --out "$out/compiled" --max-steps "$steps"
    run learned python -m bvae.train --preset cifar10 --data "$cifar" --amp --device "$device" --out "$out/learned" \
        --max-steps "$steps" --balance learned
    if [ -n "${BVAE_INCEPTION:-}" ]; then
        for name in cifar10 learned; do
            run "fid_$name" python -m bvae.evaluate "$out/$name" --device "$device" --json "$out/fid_$name.json"
        done
    fi
fi

echo
printf '%s\n' "${table[@]}"
exit $failed
