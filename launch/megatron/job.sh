# What the recipes share; they source it.

# job PATH [VERSION]: set PATHSWITCH_ARGS and its fellows, fork a branch before its first start, end where all is done.
job() {
    local lines
    lines=$(pathswitch megatron-args "$plan" --path "$1" ${2:+--version "$2"})
    eval "$lines"
    if [ "$(trained_steps)" -ge "$PATHSWITCH_END_STEP" ]; then
        echo "$1: trained already, up to step $PATHSWITCH_END_STEP"
        exit 0
    fi
    if [ "$(trained_steps)" -eq 0 ] && [ ${#PATHSWITCH_FORK[@]} -gt 0 ]; then
        "${PATHSWITCH_FORK[@]}"
    fi
}

# The step of the newest checkpoint of the job, 0 where there is none.
trained_steps() {
    cat "$PATHSWITCH_CHECKPOINTS/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0
}

# slurm_torchrun SCRIPT ARGUMENT...: run on all nodes; when the time is nearly up (USR2), save and requeue.
slurm_torchrun() {
    local nodes torchrun step code interrupted time_is_up=no
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # A port and an id of this job alone: two jobs may share a node.
    torchrun=(
        torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID"
        --rdzv-endpoint "${nodes[0]}:$((20000 + SLURM_JOB_ID % 20000))"
    )
    # The signal goes to every process of the step: Megatron saves and ends, but torchrun would die of it.
    trap 'interrupted=yes time_is_up=yes; scancel --signal=USR2 "$SLURM_JOB_ID"' USR2
    srun --kill-on-bad-exit=1 bash -c 'trap "" USR2; exec "$@"' srun \
        "${torchrun[@]}" "$@" --exit-signal-handler --exit-signal SIGUSR2 &
    step=$!
    # In the background, because bash runs a trap only after the command in the foreground; the trap ends a wait.
    while :; do
        interrupted=no code=0
        wait "$step" || code=$?
        [ "$interrupted" = yes ] || break
    done
    if [ "$(trained_steps)" -ge "$PATHSWITCH_END_STEP" ]; then
        return "$code"
    elif [ "$time_is_up" = yes ]; then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "Megatron ended at step $(trained_steps) of $PATHSWITCH_END_STEP with code $code" >&2
        return 1
    fi
}
