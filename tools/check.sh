#!/usr/bin/env bash
# All checks, as continuous integration runs them: lint, format, types, shell scripts, prose, tests.
# --lint leaves the tests out.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=tools/environment.sh
source tools/environment.sh
activate_environment "$root"

export OMP_NUM_THREADS=1 # two test processes share two cores
ruff check .
ruff format --check .
mypy
git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck --external-sources
python tools/prose.py
if [[ ${1:-} != --lint ]]; then
  python -m pytest -n 2
fi
