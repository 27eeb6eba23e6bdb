#!/usr/bin/env bash
# What one GPU does with a purification, in at most 8 minutes: bash benchmarks/gpu_check.sh [FOLDER of CIFAR-10 pictures]
set -euo pipefail
cd "$(dirname "$0")/.."
python -m benchmarks.gpu_check --device cuda --seconds 420 ${1:+--cifar "$1"}
