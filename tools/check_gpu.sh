#!/usr/bin/env bash
# Everything that only a machine with a GPU can tell, what tells most first. Exit code 1 where a row failed.
#
#   tools/check_gpu.sh OUT [IMAGES]      OUT: a folder for results; IMAGES: what bvae.train takes as --data of 32x32
#                                        images: CIFAR-10, or 15,000 of it as one .npy of 46 MB
#
# Uses the python on the PATH (or python3, or PYTHON), which must have torch with CUDA; changes nothing outside of OUT and
# build/. OUT gets results.txt, a line a row as it ends, results.tar.gz, all logs and JSON so far, and samples: at most 8
# files of 16 MiB a part.
#   PART=1               only this part, 1 to 4, each of at most ten minutes; what one builds or trains, the next ones use
#   WHEELS=DIR           packages that are missing are installed from the wheels in this folder
#   BVAE_CUDA_ARCHS=90   compile for one architecture only
#   DEVICE=cpu           try the script itself on a machine without a GPU, at sizes that tell no speed
#   STEPS=20000          steps of each stage of the runs on images
#   BVAE_INCEPTION=FILE  the weights of the FID network: its speed, and the FIDs of the runs, end to end
#   ONLY=REGEX           only the rows whose names it matches: '^(build|test_)' builds and tests
#   LIMIT=SECONDS        for all together: what there is no time for is shown as not run
#   JOBS=4               files of tests that run side by side
#   WORK=DIR             for runs and logs, in place of build/check_gpu
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: tools/check_gpu.sh OUT [IMAGES]}
images=${2:+$(realpath "$2")}
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$root" || exit
python=${PYTHON:-$(command -v python || command -v python3)} || { echo "error: no python on the PATH" >&2; exit 2; }
device=${DEVICE:-cuda}
quick=() steps=${STEPS:-20000}
[ "$device" = cuda ] || quick=(--quick) steps=${STEPS:-20}
work=${WORK:-$root/build/check_gpu}
mkdir -p "$work" && work=$(cd "$work" && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0
part=1

wanted() { # NAME: whether the row is asked for
    [[ $1 =~ ${ONLY:-.} ]] && [ "${PART:-$part}" = $part ]
}

row() { # NAME HOW SECONDS: writes a line of the table, with the last line of the row's log
    printf '%-24s %-10s %5d s   %s\n' "$1" "$2" "$3" "$(grep -v '^$' "$work/$1.log" | tail -n 1 | cut -c1-90)" |
        tee -a "$out/results.txt"
    # What there is so far, should this be ended from outside.
    (cd "$work" && find . -maxdepth 1 \( -name '*.log' -o -name '*.json' \) -print0 |
        tar --null -T - -czf "$out/.results") && mv "$out/.results" "$out/results.tar.gz"
}

ended() { # EXIT-CODE
    case $1 in
    0) echo ok ;;
    124 | 137) echo "NO TIME" ;;
    *) echo "FAILED $1" ;;
    esac
}

seconds_left() { echo $((${LIMIT:-1000000} - SECONDS)); }

run() { # NAME COMMAND...: runs it and notes how it ended
    local name=$1 started=$SECONDS code=0 left
    shift
    wanted "$name" || return 0
    left=$(seconds_left)
    if [ "$left" -lt 1 ]; then
        failed=1
        echo "not run: no time" >"$work/$name.log"
        row "$name" - 0
        return
    fi
    echo "== $name: $*"
    timeout --kill-after=10 "$left" "$@" >"$work/$name.log" 2>&1 || code=$?
    [ $code = 0 ] || failed=1
    row "$name" "$(ended $code)" $((SECONDS - started))
}

tests() { # the files of tests that have some for a GPU, JOBS at a time
    local collected=0 files file name started
    "$python" -m pytest -q --collect-only -m gpu >"$work/test_collect.log" 2>&1 || collected=$?
    files=$(sed -n 's/^\(tests.*\.py\)::.*/\1/p' "$work/test_collect.log" | sort -u)
    # A file that cannot be imported is not among them: its tests would be left out without a word.
    if [ $collected != 0 ] || [ -z "$files" ]; then
        failed=1
        [ $collected != 0 ] || collected=5
        wanted test_collect && row test_collect "FAILED $collected" 0
    fi
    # A process for each file: an error of CUDA's stays in a process, and would fail every test after it.
    for file in $files; do
        name=$(basename "$file" .py)
        wanted "$name" || continue
        while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-4}" ]; do wait -n; done
        echo "== $name: $python -m pytest -q -m gpu $file"
        (
            started=$SECONDS code=0 left=$(seconds_left)
            timeout --kill-after=10 $((left > 1 ? left : 1)) "$python" -m pytest -q -m gpu "$file" \
                >"$work/$name.log" 2>&1 || code=$?
            echo $code $((SECONDS - started)) >"$work/$name.ended"
        ) &
    done
    wait
    for file in $files; do
        name=$(basename "$file" .py)
        wanted "$name" || continue
        read -r collected started <"$work/$name.ended"
        [ "$collected" = 0 ] || failed=1
        row "$name" "$(ended "$collected")" "$started"
    done
}

sanitize() { # TOOL: over the operations' tests, odd sizes among them
    local name
    for name in test_ops test_ops_norm test_ops_step test_ops_large; do
        # Without caching each tensor is an allocation of its own, whose bounds memcheck knows.
        run "$1_$name" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
            "$python" -m pytest -q -m gpu -k "twin or gather or empty or 513" "tests/$name.py"
    done
}

train() { # NAME ARGUMENT...: bvae.train on the images, its samples, and its figures
    local name=$1 seed stage
    shift
    wanted "$name" || return 0
    if [ -z "$images" ]; then
        echo "not run: no images were given" >"$work/$name.log"
        row "$name" - 0
        return
    fi
    rm -rf "${work:?}/$name"
    run "$name" "$python" -m bvae.train --preset cifar10 --data "$images" --amp --device "$device" --out "$work/$name" \
        --max-steps "$steps" "$@"
    [ -e "$work/$name/results.json" ] || return 0
    cp "$work/$name/results.json" "$work/$name.json"
    cp "$work/$name/metrics.jsonl" "$work/$name-metrics.json"
    for stage in 1 2; do
        for seed in 0 1; do # two files of 5,000, below 16 MiB each
            run "${name}_gen$stage-$seed" "$python" -m bvae.sample "$work/$name" --device "$device" --stage $stage \
                --num 5000 --seed $seed --out "$out/$name-gen$stage-$seed.npz"
        done
    done
    if [ -n "${BVAE_INCEPTION:-}" ]; then
        run "fid_$name" "$python" -m bvae.evaluate "$work/$name" --device "$device" --json "$work/fid_$name.json"
    fi
}

missing() { # the packages of pyproject.toml that this python lacks
    "$python" - <<'END'
import importlib.metadata, re, tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"], "pytest", "pytest-timeout",
          "hypothesis", "scipy"]
for name in dict.fromkeys(re.match(r"[\w.-]+", text)[0] for text in wanted):
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(name)
END
}

absent=$(missing) || exit 2
if [ -n "$absent" ] && [ -n "${WHEELS:-}" ]; then
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet --no-index --find-links "$WHEELS" $absent >"$work/install.log" 2>&1 ||
        cat "$work/install.log" >&2
    absent=$(missing)
fi
if [ -n "$absent" ]; then
    echo "error: $python lacks" $absent "- give a folder of their wheels, with what they need: WHEELS=DIR" >&2
    exit 2
fi

part=1 # what there is, and how fast it is
run build "$python" setup.py egg_info build_ext --inplace
run info "$python" -m bvae.info
run smoke "$python" benchmarks/smoke.py "${quick[@]}" --device "$device" --json "$work/smoke.json"
run profile "$python" benchmarks/smoke.py "${quick[@]}" --device "$device" --profile --json "$work/profile.json"
if [ "${PART:-1}" = 1 ] && [ "$device" = cuda ]; then tests; fi
run bench_train "$python" benchmarks/bench_train.py "${quick[@]}" --device "$device" --recipes cifar10 --rounds 3 \
    --contestants bvae_no_compile plain eager_amp --json "$work/bench_train.json"

part=2
run bench_train_compiled "$python" benchmarks/bench_train.py "${quick[@]}" --device "$device" --recipes cifar10 \
    --contestants bvae bvae_no_compile compile --json "$work/bench_train_compiled.json"
run bench_kernels "$python" benchmarks/bench_kernels.py --device "$device" --json "$work/bench_kernels.json"
if [ "$device" = cuda ]; then sanitize memcheck; fi

part=3
if [ -z "$images" ] && wanted random; then
    # Without images the recipe's time can still be told, though nothing that it prints of losses means anything.
    "$python" -c "import numpy; r = numpy.random.default_rng(0)
numpy.save('$work/random.npy', r.integers(256, size=(15000, 32, 32, 3), dtype=numpy.uint8))"
    rm -rf "${work:?}/random"
    run random "$python" -m bvae.train --preset cifar10 --data "$work/random.npy" --amp --device "$device" \
        --out "$work/random" --max-steps "$steps"
    [ -e "$work/random/results.json" ] && cp "$work/random/results.json" "$work/random.json"
fi
train cifar10

part=4
train learned --balance learned
if [ "$device" = cuda ]; then sanitize racecheck; fi
run bench_train_celeba "$python" benchmarks/bench_train.py "${quick[@]}" --device "$device" --recipes celeba --rounds 3 \
    --contestants bvae_no_compile plain eager_amp --json "$work/bench_train_celeba.json"
run precision "$python" benchmarks/check_precision.py --compile --device "$device" --json "$work/check_precision.json"
run bench_stream "$python" benchmarks/bench_stream.py --device "$device" \
    --steps $([ "$device" = cuda ] && echo 500 || echo 20) --json "$work/bench_stream.json"
rm -rf "${work:?}/shapes"
run shapes "$python" -m bvae.train --device "$device" --out "$work/shapes"
if [ -n "${BVAE_INCEPTION:-}" ]; then
    run bench_fid "$python" benchmarks/bench_fid.py --device "$device" --json "$work/bench_fid.json"
fi

exit $failed
