#!/usr/bin/env bash
# The same under Megatron-DeepSpeed, on this machine: the main path up to a version's data, or a version's branch.
#   ./megatron_deepspeed.sh main v1
#   ./megatron_deepspeed.sh v1
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

plan=$here/one_dataset/plan.toml
gpus=8
megatron=${MEGATRON_PATH:?set it to a checkout of deepspeedai/Megatron-DeepSpeed}
MODEL_ARGS=(
    --num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 32 --num-key-value-heads 8
    --seq-length 4096 --max-position-embeddings 4096
    --use-rotary-position-embeddings --no-position-embedding
    --normalization rmsnorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
    --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model "$here/tokenizer.model"

    --micro-batch-size 2 --bf16
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
    --split 99,1,0 --seed 1234

    --save-interval 1000 --eval-interval 1000 --eval-iters 20 --log-interval 10
    --deepspeed --deepspeed_config "$here/one_dataset/ds_config.json" --zero-stage 1 --no-pipeline-parallel
)

. "$here/job.sh"
job "${1:?usage: megatron_deepspeed.sh main VERSION, or VERSION}" "${2:-}"
# The launcher gives its environment to ranks on this machine alone; for other nodes, name the two PATHSWITCH variables
# in a file .deepspeed_env.
exec deepspeed --num_gpus "$gpus" "$megatron/pretrain_gpt.py" "${MODEL_ARGS[@]}" "${PATHSWITCH_ARGS[@]}"
