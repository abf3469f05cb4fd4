#!/usr/bin/env bash
# Fork and train a version's branch, on this machine; run it again to go on after whatever stopped it.
#   ./branch.sh v1
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

plan=$here/plan.toml
gpus=8
megatron=${MEGATRON_PATH:?set it to a checkout of NVIDIA/Megatron-LM}

. "$here/model.sh"
. "$here/job.sh"
job "${1:?usage: branch.sh VERSION}"
exec torchrun --standalone --nproc-per-node "$gpus" "$megatron/pretrain_gpt.py" "${MODEL_ARGS[@]}" "${PATHSWITCH_ARGS[@]}"
