#!/usr/bin/env bash
# Everything worth running where there is a GPU, in under 8 minutes. Results go to $OUT, else to benchmarks/results.
# Each stage has its share of the time; the benchmarks keep what they have when theirs is over.
set -uo pipefail
OUT=$(realpath -m "${OUT:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
verdicts=()
failed=0

stage() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    echo "=== $name"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) verdicts+=("$name: passed in $((SECONDS - start)) s") ;;
        124 | 137) verdicts+=("$name: stopped after $limit s") ;;
        *) verdicts+=("$name: FAILED (exit code $code)") ;;
    esac
    [ "$code" = 0 ] || failed=1
}

stage tests 140 "$PYTHON" -m pytest tests/kernels -q -o addopts= -m ""
if command -v compute-sanitizer >/dev/null; then
    # Without torch's cache of memory, each tensor is an allocation whose borders the sanitizer knows.
    stage sanitizer 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
        "$PYTHON" -m benchmarks --device cuda --tiny --quick --cases bfloat16 --output "$OUT/tiny.json"
else
    verdicts+=("sanitizer: not run, compute-sanitizer is not installed")
fi
stage benchmarks 190 "$PYTHON" -m benchmarks --device cuda --output "$OUT/cuda.json"
stage compiled 60 "$PYTHON" -m benchmarks --device cuda --quick --compile --output "$OUT/compiled.json"
rm -f "$OUT/tiny.json"

echo "=== summary"
{
    printf '%s\n' "${verdicts[@]}"
    for file in "$OUT"/{cuda,compiled}.json; do
        [ -e "$file" ] && "$PYTHON" -m benchmarks.report "$file"
    done
} | tee "$OUT/summary.md"
exit "$failed"
