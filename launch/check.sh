#!/usr/bin/env bash
# Lint, format and strict types, in seconds; test.sh runs it first.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv test
cd "$root"

ruff check .
ruff format --check .
mypy
