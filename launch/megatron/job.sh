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
