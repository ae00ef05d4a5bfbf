#!/usr/bin/env bash
# Tests and times the checkout on this machine's GPU, in calls of six minutes; nothing is installed.
#
#   benchmarks/gpu_check.sh OUTDIR                  then the same again: it goes on where it ended
#   benchmarks/gpu_check.sh OUTDIR --cpu-dry-run    every stage, tiny, on CPU
#   benchmarks/gpu_check.sh --help                  all options; docs/gpu-check.md says more
#
# Needs python3, or PYTHON, with torch, triton, numpy, pytest and pytest-xdist. Exit status: 0 all is
# complete and well, 1 a stage failed or is left, 2 no GPU or wrong usage.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
unset TRITON_INTERPRET
export PYTHONPATH="$root/python:$root/kernels:$root/benchmarks" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$root/benchmarks/harness/gpu_check.py" "$@"
