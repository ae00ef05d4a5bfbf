#!/usr/bin/env bash
# Tests and times the checkout on this machine's GPU within nine minutes; nothing is installed.
#
#   benchmarks/gpu_check.sh OUTDIR
#   STAGES="tests norm attention" benchmarks/gpu_check.sh OUTDIR     some stages only
#   benchmarks/gpu_check.sh OUTDIR --cpu-dry-run                     every stage, tiny, on CPU
#
# Needs python3 with torch, triton, numpy and pytest. Stages, in this order: environment; confirm,
# the tests of what was wrong on a GPU and is mended; tests; bench, which is every suite that
# benchmarks/harness/suites.py lists; tune, which writes a table of configs, and retime, bench's
# kernels with that table; memory, a part of the tests under compute-sanitizer where that is
# installed; compile, the compile report. Each has a process and a time limit of its own, so one
# that dies takes no other along. A stage that is complete is listed in OUTDIR/stages.done and
# skipped the next time: what there was no time for is done by the same command with the same
# OUTDIR. OUTDIR stays flat: environment.txt
# confirm.log tests.log tests.xml bench.log bench.json bench.html tuned.json retimed.json tune.log
# memory.log compile.log compile.json summary.txt stages.done
#
# Also read: PYTHON, SECONDS_IN_ALL (520), TEST_ARGS, BENCH_ARGS (arguments of run.py), and
# FUSEDFORMER_COMMIT where there is no git. Exit status: 0 all well, 1 a stage failed, 2 no GPU or
# wrong usage.
set -u -o pipefail

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2
    exit 2
}

case "${1:-}" in "" | -*) usage ;; esac
case "${2:-}" in
    "") dry_run=no ;;
    --cpu-dry-run) dry_run=yes ;;
    *) usage ;;
esac
mkdir -p "$1" && out=$(cd "$1" && pwd) && cd "$(dirname "$0")/.." || exit 2

unset TRITON_INTERPRET # the kernels themselves are timed, never their interpretation on CPU
export PYTHONPATH=$PWD/python:$PWD/kernels PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
stages=${STAGES:-environment confirm tests bench tune retime memory compile}
suites=$("$python" benchmarks/harness/suites.py) || exit 2 # lines: name, seconds, arguments
stages=${stages/bench/$(cut -d ' ' -f 1 <<<"$suites" | tr '\n' ' ')}
export FUSEDFORMER_TUNED_TABLE=$out/tuned.json # read as soon as it is there
if [ "$dry_run" = yes ]; then
    # One thread: work this small is done before a busy machine wakes a second.
    export OMP_NUM_THREADS=1
    test_args=${TEST_ARGS:-tests/benchmarks --collect-only}
    confirm_args=--collect-only
    bench_args="--device cpu --sizes tiny --quick"
    tune_args="--dry-run --case ^softmax_forward.32768$"
    compile_args="--target sm_90 --case ^pack$"
elif "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    test_args=${TEST_ARGS:-tests}
    confirm_args=
    # Compiling many small kernels and running them briefly: side by side where that is possible.
    if "$python" -c 'import xdist' 2>/dev/null; then
        test_args="$test_args -n 8"
        confirm_args="-n 8"
    fi
    bench_args=${BENCH_ARGS---compile headline --seconds 0.05}
    tune_args=${TUNE_ARGS-}
    compile_args=
else
    echo "gpu_check: torch sees no GPU on this machine (--cpu-dry-run works without one)" >&2
    exit 2
fi

end=$(($(date +%s) + ${SECONDS_IN_ALL:-520}))
failed=""

# stage NAME LIMIT LOG COMMAND...: run COMMAND for at most LIMIT seconds, or what is left of all.
# LIMIT in COMMAND becomes the seconds after which it had better start nothing new.
stage() {
    local name=$1 limit=$2 log=$out/$3 status
    shift 3
    case " $stages " in *" $name "*) ;; *) return ;; esac
    if grep -qsx "$name" "$out/stages.done"; then
        echo "== $name: complete before"
        return
    fi
    local left=$((end - $(date +%s)))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "== $name: no time left"
        failed="$failed $name"
        return
    fi
    echo "== $name: at most $limit s"
    # Interrupted first, so that pytest and run.py write what they have; killed 10 s later.
    timeout --signal=INT --kill-after=10 "$limit" "${@//LIMIT/$((limit * 4 / 5))}" 2>&1 \
        | tee -a "$log"
    status=${PIPESTATUS[0]}
    if [ "$status" -eq 0 ]; then
        echo "$name" >>"$out/stages.done"
    else
        echo "== $name: exit status $status"
        failed="$failed $name"
    fi
}

describe='
import importlib.metadata as m, os, subprocess, sys
def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
commit = os.environ.get("FUSEDFORMER_COMMIT") or said("git", "rev-parse", "HEAD") or "unknown"
print("commit", commit)
print("python", sys.version.split()[0])
for package in ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "pytest-xdist"):
    try:
        print(package, m.version(package))
    except m.PackageNotFoundError:
        print(package, "absent")
print(said("nvidia-smi") or "no nvidia-smi")
'

# shellcheck disable=SC2086  # the arguments are several words
{
    stage environment 30 environment.txt "$python" -c "$describe"
    # Values narrower than keys, one causal token, fused multiply-adds, queries without keys, and
    # large or finitely masked scores.
    stage confirm 120 confirm.log "$python" -m pytest -q -p no:cacheprovider $confirm_args \
        tests/ops/test_any_logit.py tests/ops/test_attention.py tests/ops/test_varlen_attention.py \
        tests/ops/test_contrastive.py tests/ops/test_activation.py tests/ops/test_embedding.py \
        tests/ops/test_linear_cross_entropy.py tests/ops/test_attention_features.py \
        tests/kernels tests/test_descriptors.py
    stage tests 210 tests.log "$python" -m pytest -q -p no:cacheprovider \
        "--junitxml=$out/tests.xml" $test_args
    while read -r suite seconds arguments; do
        stage "$suite" "$seconds" bench.log "$python" benchmarks/run.py --suite "$suite" \
            --out "$out/bench.json" --budget LIMIT $bench_args $arguments </dev/null
    done <<<"$suites"
    stage tune 420 tune.log "$python" -m fusedformer tune --out "$out/tuned.json" \
        --budget LIMIT $tune_args
    stage retime 120 bench.log "$python" benchmarks/run.py --out "$out/retimed.json" \
        --suite norm softmax activation attention --budget LIMIT $bench_args --quick --compile none
    # Without the caching allocator, so that each tensor's end is where memory ends.
    stage memory 120 memory.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 bash -c '
        command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not here"; exit; }
        exec compute-sanitizer --tool memcheck --error-exitcode 9 "$@"' memory \
        "$python" -m pytest -q -x -p no:cacheprovider tests/ops/test_softmax.py \
        tests/ops/test_norm.py tests/ops/test_attention_parts.py -k "width or lengths or few"
    stage compile 180 compile.log "$python" -m fusedformer compile-report \
        --json "$out/compile.json" $compile_args
}

{
    [ ! -s "$out/tests.log" ] || echo "tests: $(tail -n 1 "$out/tests.log")"
    if [ -s "$out/bench.json" ]; then
        "$python" benchmarks/reporting/table.py --headline "$out/bench.json"
        "$python" benchmarks/reporting/page.py "$out/bench.json" --out "$out/bench.html"
        [ ! -s "$out/retimed.json" ] \
            || "$python" benchmarks/reporting/compare.py "$out/bench.json" "$out/retimed.json"
    fi
    echo "stages that failed or were cut short:${failed:- none}"
} 2>&1 | tee "$out/summary.txt"
[ -z "$failed" ]
