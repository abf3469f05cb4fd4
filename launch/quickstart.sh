#!/usr/bin/env bash
# Train four versions of a small LLaMA by path switching, and continual pre-training beside it, on this machine's CPU.
#   ./launch/quickstart.sh [--full] [--optimizer pathswitch]
# --full adds pre-training from scratch (PTFS) and WSD-S; --optimizer pathswitch trains with the fused kernels.
# Run again, it goes on where it stopped. OUT=folder chooses the run folder (default runs/quickstart).
set -euo pipefail

paradigms=(path_switching cpt_rewarm)
optimizer=()
while [ $# -gt 0 ]; do
    case "$1" in
        --full) paradigms+=(wsd_s ptfs) ;;
        --optimizer) optimizer=(--optimizer "${2:?--optimizer takes adamw or pathswitch}"); shift ;;
        *) echo "usage: $0 [--full] [--optimizer adamw|pathswitch]" >&2; exit 2 ;;
    esac
    shift
done

. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv report

out=${OUT:-$root/runs/quickstart}
for paradigm in "${paradigms[@]}"; do
    pathswitch run "$root/launch/quickstart.toml" --out "$out" --paradigm "$paradigm" ${optimizer[@]+"${optimizer[@]}"}
done
pathswitch compare "$out"
pathswitch report "$out"
