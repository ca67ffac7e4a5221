#!/bin/sh
# Checks the code for GPUs where there is no CUDA toolkit: check-cuda.sh [flags of cargo clippy].
#
# With the feature cuda, candle compiles its kernels with nvcc. A check of types needs none of them, so this file is
# also what it gives candle as nvcc: a program that makes empty files.
set -eu
if [ "${CHECK_CUDA_IS_NVCC:-}" != 1 ]; then
    export CHECK_CUDA_IS_NVCC=1 NVCC="$(cd "$(dirname "$0")" && pwd)/check-cuda.sh"
    export CUDA_COMPUTE_CAP=90 CUDARC_CUDA_VERSION=13000
    exec cargo clippy --manifest-path "$(dirname "$0")/Cargo.toml" --all-targets --features cuda "$@"
fi
while [ $# -gt 0 ]; do
    case $1 in
    --version) echo "release 13.0, V13.0.88" ;;
    -o) : > "$2" ;;
    --output-directory) folder=$2 ;;
    *.cu) [ -z "${folder:-}" ] || : > "$folder/$(basename "$1" .cu).ptx" ;;
    esac
    shift
done
