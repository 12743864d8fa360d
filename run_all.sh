#!/usr/bin/env bash
# The sweep over languages, inits and amounts of data, and its report; see ./run_all.sh --help.
# With no option: the mini preset on this machine, about half an hour on two cores.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"
activate_environment "$root"
exec python -m icetransfer.sweep "$@"
