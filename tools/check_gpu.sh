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
#   ONLY=REGEX           only the rows whose names it matches: '^(build|test_)' builds and tests
#   LIMIT=SECONDS        for all together: what matters most comes first, what there is no time for is shown as not run
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
    local name=$1 started=$SECONDS code=0 left=$((${LIMIT:-1000000} - SECONDS)) ended
    shift
    [[ $name =~ ${ONLY:-.} ]] || return 0
    if [ $left -lt 1 ]; then
        failed=1
        table+=("$(printf '%-24s not run: no time' "$name")")
        return
    fi
    echo "== $name: $*"
    timeout --kill-after=10 $left "$@" >"$out/$name.log" 2>&1 || code=$?
    [ $code = 0 ] || failed=1
    case $code in
    0) ended=ok ;;
    124 | 137) ended="NO TIME" ;;
    *) ended="FAILED $code" ;;
    esac
    table+=("$(printf '%-24s %-10s %5d s   %s' "$name" "$ended" $((SECONDS - started)) \
        "$(grep -v '^$' "$out/$name.log" | tail -n 1 | cut -c1-90)")")
}

sanitize() { # TOOL: over the operations' tests, odd sizes among them
    for name in test_ops test_ops_large; do
        # Without caching each tensor is an allocation of its own, whose bounds memcheck knows.
        run "$1_$name" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
            python -m pytest -q -m gpu -k "float64_twin or gather or empty or 513" "tests/$name.py"
    done
}

train() { # NAME ARGUMENT...: bvae.train on CIFAR-10
    local name=$1
    shift
    [ -n "$cifar" ] || return 0
    run "$name" python -m bvae.train --preset cifar10 --data "$cifar" --amp --device "$device" --out "$out/$name" \
        --max-steps "$steps" "$@"
}

run build python setup.py build_ext --inplace
run info python -m bvae.info
if [ "$device" = cuda ]; then
    python -m pytest -q --collect-only -m gpu >"$out/collect.log" 2>&1
    files=$(sed -n 's/^\(tests.*\.py\)::.*/\1/p' "$out/collect.log" | sort -u)
    [ -n "$files" ] || run test_collect cat "$out/collect.log" /no/tests/found
    # A process for each file: an error of CUDA's stays in a process, and would fail every test after it.
    for file in $files; do
        run "$(basename "$file" .py)" python -m pytest -q -m gpu "$file"
    done
    sanitize memcheck
fi
run bench_train python benchmarks/bench_train.py --device "$device" --recipes cifar10 --json "$out/bench_train.json"
run bench_kernels python benchmarks/bench_kernels.py --device "$device" --json "$out/bench_kernels.json"
train cifar10
if [ "$device" = cuda ]; then sanitize racecheck; fi
run bench_stream python benchmarks/bench_stream.py --device "$device" --steps $([ "$device" = cuda ] && echo 500 || echo 20) \
    --json "$out/bench_stream.json"
run bench_train_celeba python benchmarks/bench_train.py --device "$device" --recipes celeba --json "$out/bench_train_celeba.json"
run shapes python -m bvae.train --device "$device" --out "$out/shapes"
train compiled --compile
train learned --balance learned
if [ -n "${BVAE_INCEPTION:-}" ]; then
    run bench_fid python benchmarks/bench_fid.py --device "$device" --json "$out/bench_fid.json"
    for name in cifar10 learned; do
        [ -d "$out/$name" ] && run "fid_$name" python -m bvae.evaluate "$out/$name" --device "$device" --json "$out/fid_$name.json"
    done
fi
run precision python benchmarks/check_precision.py --compile --device "$device" --json "$out/check_precision.json"

echo
printf '%s\n' "${table[@]}"
exit $failed
