# Sourced by quickstart.sh and test.sh: `make_venv EXTRA` brings .venv up to date with the pinned set of constraints.txt.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# Install Debian packages where we may; say which ones are missing where we may not.
need_apt() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "apt-get install $*"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@"; } >/dev/null ||
            fail "apt-get install $* failed"
    else
        fail "needs Debian packages: apt-get install $* (and run this again)"
    fi
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3 python3.12 python3.13; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer, and found none (set PYTHON to its path)"
}

make_venv() {
    local extra=$1 python stamp
    # Compiled extensions of DeepSpeed stay inside the project's folder.
    export TORCH_EXTENSIONS_DIR=$venv/torch_extensions PATH="$venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
    stamp=$venv/installed-$extra-$(cat "$root/pyproject.toml" "$root/launch/constraints.txt" | sha256sum | cut -c1-16)
    [ -e "$stamp" ] && return
    python=$(find_python)
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        need_apt "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    fi
    echo "installing the pinned set into $venv (a minute or two the first time)"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -q -c "$root/launch/constraints.txt" -e "$root[$extra]" || fail "pip install failed"
    touch "$stamp"
}
