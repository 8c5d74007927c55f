#!/usr/bin/env bash
# Everything that only a GPU can say, in under six minutes on one card: the kernel's table, the choices by device, the GPU
# tests, speed against the twins, a training step.
#   benchmarks/on_gpu.sh FOLDER [SECONDS]     writes FOLDER/gpu.json, gpu.png, tests.txt
# Wants torch with CUDA, triton, transformers and what the extra [train] installs; the package itself need not be installed.
#   DEVICE=cpu PRESET=nano benchmarks/on_gpu.sh FOLDER      tries the script where there is no card
set -uo pipefail
folder=$(realpath "${1:?a folder to write to}") || exit 2
seconds=${2:-240}
device=${DEVICE:-cuda}
preset=${PRESET:-2b}
mkdir -p "$folder"
cd "$(dirname "$0")/.."

# Where nothing is installed, the clone is the package under its name, and the command line beside it.
python=${PYTHON:-python3}
names=$(mktemp -d)
trap 'rm -rf "$names"' EXIT
ln -s "$PWD" "$names/mono_internvl"
ln -s "$PWD/cli" "$names/mono_internvl_cli"
export PYTHONPATH="$names${PYTHONPATH:+:$PYTHONPATH}"

# What has goals comes first: a budget leaves out what would not end in time.
"$python" -m mono_internvl benchmark routing head attention prefill ttft decode generate train \
    --device "$device" --preset "$preset" --budget-seconds "$seconds" \
    --json "$folder/gpu.json" --picture "$folder/gpu.png" || failed=1
if [ "$device" = cuda ]; then
    timeout 110 "$python" -m pytest -q -m gpu tests/test_experts_kernel.py tests/test_output_head.py \
        tests/test_decode_attention.py tests/test_compile.py tests/test_performance.py 2>&1 | tee "$folder/tests.txt" || failed=1
fi
exit "${failed:-0}"
