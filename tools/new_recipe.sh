#!/usr/bin/env bash
# Makes a recipe for a new language from egs/TEMPLATE, as in: tools/new_recipe.sh cy "Welsh"
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"
cd "$root"
activate_environment "$root"
exec python -m icetransfer.new_recipe "$@"
