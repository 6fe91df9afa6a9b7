#!/usr/bin/env bash
# Train two models to a target accuracy on one GPU. Usage: bench/train_on_gpu.sh OUT [--dry-run]
#
#   cifar10         hybrid_vin, 0.70 million parameters, to 90% top-1; the goal is under 5 minutes on an H100
#   tiny-imagenet   hybrid_vin, 0.72 million parameters, to 46% top-1 (the best published log, for CvN, reaches 45.48%)
#
# Each run stops when it reaches its target. The last line of its output states its duration in seconds. Datasets are read
# from DATA_DIR or downloaded. --dry-run trains each model for one epoch on the digits dataset, on a CPU. Set PYTHON to use a
# different interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:?bench/train_on_gpu.sh OUT [--dry-run]: the folder of the runs is missing}"
export PYTHONPATH="$root:$root/bench/gpu/checkout${PYTHONPATH:+:$PYTHONPATH}"
vision=(--recipe fast --model hybrid_vin --aa trivial --mixup 0.2 --cutmix 1 --batch-size 512 --compile)
shape=(patch_size=4 class_token=False global_pool=avg position=rope_axial landmarks=grid)

record() { # name, top-1, epochs, model arguments
    local name="$1" top1="$2" epochs="$3"
    shift 3
    local data=(--dataset "$name" ${DATA_DIR:+--data-dir "$DATA_DIR"} --epochs "$epochs" --time-to "$top1" --device cuda)
    if [ "$dry" ]; then
        data=(--dataset digits --epochs 1 --warmup-epochs 0 --device cpu --no-compile --channels-last)
    fi
    "${PYTHON:-python3}" -m vix_kernels train "${vision[@]}" "${data[@]}" \
        --model-kwargs "${shape[@]}" "$@" --output "$out/$name"
}

dry=""
[ "${2:-}" = --dry-run ] && dry=1
record cifar10 90 200 num_landmarks=16
record tiny-imagenet 46 150 num_landmarks=64
