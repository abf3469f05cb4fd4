#!/usr/bin/env bash
# Run every check: lint, format, types, tests.
#   ./launch/test.sh [--quick] [pytest arguments]      --quick leaves out the tests that start several training jobs
set -euo pipefail

marker=()
if [ "${1:-}" = --quick ]; then
    marker=(-m "not slow")
    shift
fi

. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
# DeepSpeed compiles an extension when a process group starts, and that takes a compiler and Python's headers.
command -v g++ >/dev/null || need_apt g++
make_venv test
cd "$root"
include=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$include/Python.h" ] || need_apt "python$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')-dev"
# A compilation that was killed leaves a lock on which the next one would wait for ever.
find "$TORCH_EXTENSIONS_DIR" -name lock -delete 2>/dev/null || true

launch/check.sh
python -m pytest ${marker[@]+"${marker[@]}"} "$@"
