# shellcheck shell=bash
# shellcheck shell=bash
# Sourced: activate_environment gives a `python` with requirements.txt installed.
#
# An active virtual or conda environment is used as it is; what is missing in it is installed.
# Without one, .venv is made.  A stamp with the checksum of requirements.txt says that its
# installation was finished: a second call is instant, and one that was killed is done again.

environment_die() {
  echo "error: $*" >&2
  exit 2
}

# activate_environment ROOT: ROOT is the folder of the repository.
activate_environment() {
  local root=$1
  if [[ -z ${CONDA_PREFIX:-} && ${VIRTUAL_ENV:-$root/.venv} == "$root/.venv" ]]; then
    environment_own "$root"
  else
    environment_active "$root"
  fi
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
}

environment_own() {
  local root=$1 stamp=$1/.venv/.icetransfer-requirements wanted python
  wanted=$(sha256sum <"$root/requirements.txt")
  if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    mkdir -p "$root/.venv"
    exec 9>"$root/.venv/.lock"
    flock 9 # of two recipes started at once, the second waits and finds the work done
    if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
      python=$(environment_python)
      "$python" -c 'import ensurepip, venv' 2>/dev/null || environment_die \
        "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install $(
          "$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
      echo "installing requirements.txt into $root/.venv (once, some minutes)" >&2
      "$python" -m venv "$root/.venv"
      "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$root/requirements.txt" >&2 ||
        environment_die "requirements.txt could not be installed; the lines above say why"
      # After `source .venv/bin/activate`, `python -m icetransfer.<module>` works in any folder.
      echo "$root" >"$("$root/.venv/bin/python" -c \
        'import sysconfig; print(sysconfig.get_path("purelib"))')/icetransfer.pth"
      echo "$wanted" >"$stamp"
    fi
    exec 9>&-
  fi
  # shellcheck disable=SC1091 # made just above
  source "$root/.venv/bin/activate"
}

# Prints a Python of a version that the pinned packages support.
environment_python() {
  local python
  for python in python3 python3.12 python3.11 python3.10; do
    if "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null
    then
      echo "$python"
      return
    fi
  done
  command -v python3 >/dev/null || environment_die "python3 was not found: install Python 3.10 to \
3.12; on Debian and Ubuntu: apt-get install python3 python3-venv"
  environment_die "python3 is $(python3 --version); expected Python 3.10 to 3.12 on the PATH"
}

# Installs into the active environment what it lacks; what it has in other versions stays.
environment_active() {
  local missing
  missing=$(python - "$1/requirements.txt" <<'PYTHON'
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
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
  ) || exit 2
  [[ -n $missing ]] || return 0
  echo "installing into the active environment: ${missing//$'\n'/ }" >&2
  # shellcheck disable=SC2086 # an argument for each package
  python -m pip install --quiet --disable-pip-version-check $missing >&2 ||
    environment_die "these packages could not be installed; the lines above say why"
}
