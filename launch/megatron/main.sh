#!/usr/bin/env bash
# Train the main path on one version's data, on this machine; run it again to go on after whatever stopped it.
#   ./main.sh v1
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

plan=$here/plan.toml
gpus=8
megatron=${MEGATRON_PATH:?set it to a checkout of NVIDIA/Megatron-LM}

. "$here/model.sh"
. "$here/job.sh"
job main "${1:?usage: main.sh VERSION}"
exec torchrun --standalone --nproc-per-node "$gpus" "$megatron/pretrain_gpt.py" "${MODEL_ARGS[@]}" "${PATHSWITCH_ARGS[@]}"
