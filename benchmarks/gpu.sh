#!/usr/bin/env bash
# Everything worth running where there is a GPU, in under 8 minutes. Results go to $OUT, else to benchmarks/results.
# Each stage has its share of the time; the benchmarks keep what they have when theirs is over. BENCHMARKS_SECONDS and
# COMPILED_SECONDS change theirs; SANITIZE=0 leaves the sanitizer out.
set -uo pipefail
OUT=$(realpath -m "${OUT:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.." || exit
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=${PYTHON:-python}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
verdicts=()
failed=0

run() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    case $code in
        0) echo "$name: passed in $((SECONDS - start)) s" ;;
        124 | 137) echo "$name: stopped after $limit s" ;;
        *) echo "$name: FAILED (exit code $code)" ;;
    esac >"$OUT/$name.verdict"
    return $code
}

finish() { # NAME CODE
    tail -n 25 "$OUT/$1.log"
    verdicts+=("$(cat "$OUT/$1.verdict")")
    rm "$OUT/$1.verdict"
    [ "$2" = 0 ] || failed=1
}

# Nothing is timed yet, so the sanitizer runs beside the tests: on small benchmarks, and on tests of what serves large
# batches only. Without torch's cache of memory, each tensor is an allocation whose borders the sanitizer knows.
sanitize() { # NAME COMMAND...
    local name=$1
    shift
    run "$name" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 "$PYTHON" "$@"
}
if [ "${SANITIZE:-1}" = 1 ] && command -v compute-sanitizer >/dev/null; then
    sanitize sanitizer -m benchmarks --device cuda --tiny --quick --cases bfloat16 --output "$OUT/tiny.json" &
    sanitizer=$!
    sanitize sanitizer-composed -m pytest tests/kernels/test_composed.py -q -o addopts= -k "units or zeros" &
    sanitizer_composed=$!
else
    verdicts+=("sanitizer: not run")
fi
# So does a short training run, where there is what it needs.
if "$PYTHON" -c "import jsonargparse, open_clip" 2>/dev/null; then
    runs=$(mktemp -d)
    run training 150 "$PYTHON" train/run.py --epochs 1 --precision bf16 --logs "$runs" --name gpu --workers 2 &
    training=$!
else
    verdicts+=("training: not run")
fi
# Compiling is most of the tests' time.
workers=$("$PYTHON" -c "import xdist" 2>/dev/null && echo "-n $(($(nproc) > 10 ? $(nproc) - 2 : 8)) --dist worksteal")
echo "=== tests"
# shellcheck disable=SC2086
run tests 180 "$PYTHON" -m pytest tests/kernels tests/test_cuda.py -q -o addopts= -m "" --continue-on-collection-errors $workers
finish tests $?
if [ -n "${sanitizer:-}" ]; then
    echo "=== sanitizer"
    wait "$sanitizer"
    finish sanitizer $?
    wait "$sanitizer_composed"
    finish sanitizer-composed $?
    rm -f "$OUT/tiny.json"
fi
if [ -n "${training:-}" ]; then
    echo "=== training"
    wait "$training"
    finish training $?
    rm -rf "$runs"
fi
echo "=== benchmarks"
run benchmarks "${BENCHMARKS_SECONDS:-200}" "$PYTHON" -m benchmarks --device cuda --output "$OUT/cuda.json"
finish benchmarks $?
echo "=== compiled"
run compiled "${COMPILED_SECONDS:-60}" "$PYTHON" -m benchmarks --device cuda --compile --cases 'similarity/heuristic/5000*bfloat16' --output "$OUT/compiled.json"
finish compiled $?

echo "=== summary"
{
    printf '%s\n' "${verdicts[@]}"
    for file in "$OUT"/{cuda,compiled}.json; do
        [ -e "$file" ] && "$PYTHON" -m benchmarks.report "$file"
    done
} | tee "$OUT/summary.md"
exit "$failed"
