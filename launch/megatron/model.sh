# The model and its training, for every job of a plan alike; Megatron-LM's arguments that the plan does not decide.
MODEL_ARGS=(
    --num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192
    --num-attention-heads 32 --group-query-attention --num-query-groups 8
    --seq-length 4096 --max-position-embeddings 4096
    --position-embedding-type rope --rotary-base 500000
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$here/tokenizer"

    --micro-batch-size 2 --bf16 --use-distributed-optimizer
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
    --split 99,1,0 --seed 1234

    --save-interval 1000 --eval-interval 1000 --eval-iters 20 --log-interval 10
)
