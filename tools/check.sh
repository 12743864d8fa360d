#!/usr/bin/env bash
# All checks, as CI runs them: style, types, shell, tests.  Makes its environment by itself.
#
#   tools/check.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --help ]; then
  sed -n '2,4s/^# \{0,1\}//p' tools/check.sh
  exit
fi
# shellcheck source=tools/environment.sh
source tools/environment.sh

export OMP_NUM_THREADS=1 # two test processes, one thread each
ruff check .
ruff format --check .
mypy
shellcheck --external-sources run_all.sh tools/*.sh egs/*/run.sh .ci/run
python -m pytest -n 2 "$@"
