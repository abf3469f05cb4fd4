#!/usr/bin/env bash
# Run every check: lint, format, types, tests.
#   ./launch/test.sh [--quick] [pytest arguments]      --quick leaves out what takes seconds
set -euo pipefail

marker=()
if [ "${1:-}" = --quick ]; then
    marker=(-m "not slow")
    shift
fi

. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# The tests of jobs on several machines run real SLURM, sshd, pdsh and Open MPI on this one; where something is missing
# they are skipped, and say what.
install_launchers() {
    local tool packages=()
    for tool in slurmctld slurmd sbatch=slurm-client munged=munge sshd=openssh-server ssh=openssh-client pdsh \
        mpirun=openmpi-bin ip=iproute2 mkfs.btrfs=btrfs-progs shellcheck; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${tool%=*}" >/dev/null || packages+=("${tool#*=}")
    done
    [ ${#packages[@]} = 0 ] && return
    (need_apt --no-install-recommends "${packages[@]}") || echo "skipping the tests that need ${packages[*]}"
}

# DeepSpeed compiles an extension when a process group starts, and that takes a compiler and Python's headers.
command -v g++ >/dev/null || need_apt g++
[ ${#marker[@]} -gt 0 ] || install_launchers
make_venv test
cd "$root"
include=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$include/Python.h" ] || need_apt "python$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')-dev"
# A compilation that was killed leaves a lock on which the next one would wait for ever.
find "$TORCH_EXTENSIONS_DIR" -name lock -delete 2>/dev/null || true

launch/check.sh
# Two at a time: ranks that wait for each other leave cores idle.
python -m pytest -n 2 ${marker[@]+"${marker[@]}"} "$@"
