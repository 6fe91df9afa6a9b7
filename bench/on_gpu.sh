#!/usr/bin/env bash
# Everything a GPU has to say about this checkout, into the folder OUT: bench/on_gpu.sh OUT; --help says more.
# Needs python3 with torch and Triton, no network, no installation; PYTHON chooses another Python.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
"$python" -c 'import sys; from importlib.util import find_spec as has; sys.exit(not (has("torch") and has("triton")))' || {
    echo "bench/on_gpu.sh: nothing to measure here: $python has no torch, or no triton (PYTHON chooses another)"
    exit 201
}
export PYTHONPATH="$root:$root/bench/gpu/checkout${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
unset TRITON_INTERPRET
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then
        export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
    fi
done
exec "$python" -m bench.gpu.run "$@"
