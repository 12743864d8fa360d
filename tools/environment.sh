# Sourced: an environment with requirements.txt installed, and `python` in it.
#
# An active virtual or conda environment is used as it is; without one, .venv is made.  A stamp with
# the checksum of requirements.txt says that the installation was finished: a second call is instant,
# and one that was killed is done again.

environment_die() { echo "error: $*" >&2; exit 2; }

activate_environment() {
  local root=$1 found wanted stamp
  command -v python3 >/dev/null || environment_die "python3 was not found: install Python 3.10 to 3.12"
  if [[ -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} ]]; then
    found=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case $found in
      3.10 | 3.11 | 3.12) ;;
      *) environment_die "python3 is $found; expected 3.10 to 3.12" ;;
    esac
    if [[ ! -x $root/.venv/bin/pip ]]; then
      python3 -m venv "$root/.venv" || environment_die \
        "python3 cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"
    fi
    # shellcheck disable=SC1091  # made just above
    source "$root/.venv/bin/activate"
  fi
  stamp=${VIRTUAL_ENV:-$CONDA_PREFIX}/.icetransfer-requirements
  wanted=$(sha256sum "$root/requirements.txt" | cut -d ' ' -f 1)
  if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    echo "installing requirements.txt into ${VIRTUAL_ENV:-$CONDA_PREFIX}" >&2
    python -m pip install --quiet --requirement "$root/requirements.txt" ||
      environment_die "requirements.txt could not be installed; the lines above say why"
    echo "$wanted" >"$stamp"
  fi
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
}
