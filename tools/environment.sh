# shellcheck shell=bash
# Sourced by run_all.sh, egs/*/run.sh and tools/check.sh: finds or makes the Python environment.
#
# An active virtual or conda environment is used as it is, with what is missing in it installed.
# Otherwise .venv is made at the root of the repository from requirements.txt; a stamp in it holds
# the checksum of the list, so that a finished install is found at once and a killed one redone.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints the first Python in the versions that the pinned packages support.
find_python() {
  local python
  for python in python3 python3.12 python3.11 python3.10; do
    if "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null
    then
      printf '%s\n' "$python"
      return
    fi
  done
  command -v python3 >/dev/null ||
    fail "python3 not found; install Python 3.10 to 3.12 (Debian: apt-get install python3 python3-venv)"
  fail "$(python3 --version) is not supported and no other is on the PATH; install Python 3.10 to 3.12"
}

make_venv() {
  local venv="$repo/.venv" stamp="$repo/.venv/requirements.sha256" python sum
  sum=$(sha256sum <"$repo/requirements.txt")
  if [ ! -f "$stamp" ] || [ "$(<"$stamp")" != "$sum" ]; then
    mkdir -p "$venv"
    exec 9>"$venv/.lock"
    flock 9 # two recipes started at once: the second waits and finds the work done
    if [ ! -f "$stamp" ] || [ "$(<"$stamp")" != "$sum" ]; then
      python=$(find_python)
      "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module; on Debian or Ubuntu: apt-get install $(
          "$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
      printf 'installing requirements.txt into %s (once; some minutes)\n' "$venv" >&2
      "$python" -m venv "$venv"
      "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -r "$repo/requirements.txt" >&2 || fail "pip could not install requirements.txt; see above"
      printf '%s\n' "$sum" >"$stamp"
    fi
    exec 9>&-
  fi
  export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
  hash -r
}

# Prints the lines of requirements.txt whose package the active environment lacks.
missing_requirements() {
  python - "$repo/requirements.txt" <<'PYTHON'
import sys
from importlib import metadata
from pip._vendor.packaging.requirements import Requirement

if not (3, 10) <= sys.version_info < (3, 13):
    sys.exit(f"error: the active environment has Python {sys.version.split()[0]}; 3.10 to 3.12 work")
for line in open(sys.argv[1], encoding="utf-8"):
    line = line.partition("#")[0].strip()
    if not line:
        continue
    wanted = Requirement(line)
    if wanted.marker and not wanted.marker.evaluate():
        continue
    try:
        metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        print(f"{wanted.name}{wanted.specifier}")
PYTHON
}

complete_active() {
  local missing
  missing=$(missing_requirements) || exit 2
  [ -n "$missing" ] || return 0
  printf 'installing into the active environment:\n%s\n' "$missing" >&2
  # shellcheck disable=SC2086 # one argument for each package
  python -m pip install --quiet --disable-pip-version-check $missing >&2 ||
    fail "pip could not install what is missing; see above"
}

if [ "${VIRTUAL_ENV:-$repo/.venv}" = "$repo/.venv" ] && [ -z "${CONDA_PREFIX:-}" ]; then
  make_venv
else
  complete_active
fi
