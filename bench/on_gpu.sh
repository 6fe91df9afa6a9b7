#!/usr/bin/env bash
# Test and measure this checkout on a GPU. Usage: bench/on_gpu.sh OUT, where OUT is the folder for the results. Options: --help.
# The script needs python3 with torch, Triton, NumPy and einops, but no network and no installation of this library. Set PYTHON
# to use a different interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
missing="$("$python" -c '
from importlib.util import find_spec
print(*(name for name in ("torch", "triton", "numpy", "einops") if not find_spec(name)))')" || missing="the required packages"
if [ "$missing" ]; then
    echo "bench/on_gpu.sh: nothing to measure here: $python lacks ${missing// /, } (set PYTHON to use a different interpreter)"
    exit 201
fi
export PYTHONPATH="$root:$root/bench/gpu/checkout${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
unset TRITON_INTERPRET
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then
        export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
    fi
done
exec "$python" -m bench.gpu.run "$@"
