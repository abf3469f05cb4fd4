#!/usr/bin/env bash
# Train four versions of a small LLaMA by path switching, and continual pre-training beside it, on this machine's CPU.
#   ./launch/quickstart.sh [--full]      --full adds pre-training from scratch (PTFS) and WSD-S
# Run again, it goes on where it stopped. OUT=folder chooses the run folder (default runs/quickstart).
set -euo pipefail

paradigms=(path_switching cpt_rewarm)
case "${1:-}" in
    "") ;;
    --full) paradigms+=(wsd_s ptfs) ;;
    *) echo "usage: $0 [--full]" >&2; exit 2 ;;
esac

. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv report

out=${OUT:-$root/runs/quickstart}
for paradigm in "${paradigms[@]}"; do
    pathswitch run "$root/launch/quickstart.toml" --out "$out" --paradigm "$paradigm"
done
pathswitch compare "$out"
pathswitch report "$out"
