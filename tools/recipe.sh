# shellcheck shell=bash
# Sourced by egs/*/run.sh: options, the environment, the experiment's config, and `stage`.
#
# A run.sh may use $data and $exp in the titles of its stages.  Stages run in the recipe's folder.

recipe=$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)
language=$(basename "$recipe")
first_stage=0 last_stage=10 help=false running='' exp=''
# shellcheck disable=SC2034 # for the titles of run.sh
data=data
resolve=(--conf conf/default.yaml)
settings=()

usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$recipe/run.sh"
  cat <<EOF

  --stage N, --stop-stage M  the first and the last stage to run (default 0 and 10)
  --init en|ml|random        what to start from
  --hours 8min|100h|100      how much training data (default: all)
  --seed N                   of initialisation, batches and augmentation
  --conf FILE                more settings, over conf/default.yaml; may be repeated
  --exp DIR                  experiment folder, relative to $recipe (default exp/<its name>)
  key=value                  any setting, over all files, as in train.max_steps=500
  --help                     this

stages:
EOF
}

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

stage_number() {
  [[ $2 =~ ^([0-9]|10)$ ]] || die "$1 takes a stage from 0 to 10, got '$2'"
  printf '%s\n' "$2"
}

# A --conf file is looked for where the user stands, then in the recipe's folder.
conf_file() {
  if [ -f "$1" ]; then
    realpath -- "$1"
  elif [ -f "$recipe/$1" ]; then
    printf '%s\n' "$recipe/$1"
  else
    die "--conf $1: there is no such file here or in $recipe"
  fi
}

while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) help=true ;;
    --stage | --stop-stage | --init | --hours | --seed | --conf | --exp)
      [ $# -ge 2 ] || die "$1 needs a value; see $0 --help"
      case $1 in
        --stage) first_stage=$(stage_number "$1" "$2") ;;
        --stop-stage) last_stage=$(stage_number "$1" "$2") ;;
        --conf)
          file=$(conf_file "$2")
          resolve+=(--conf "$file")
          ;;
        --exp) resolve+=(--exp "$2") ;;
        *) settings+=("${1#--}=$2") ;;
      esac
      shift
      ;;
    -*) die "unknown option $1; see $0 --help" ;;
    *=*) settings+=("$1") ;;
    *) die "expected an option or key=value, got '$1'; see $0 --help" ;;
  esac
  shift
done

py() {
  python -m "icetransfer.$1" --exp "$exp"
}

# stage NUMBER TITLE COMMAND...: runs the command when the number lies between --stage and
# --stop-stage.  Never write `stage ... || something`: it switches `set -e` off in the command.
stage() {
  local number=$1 title=$2 start=$SECONDS
  shift 2
  if $help; then
    printf '  %2d  %s\n' "$number" "$title"
    return
  fi
  if [ "$number" -lt "$first_stage" ] || [ "$number" -gt "$last_stage" ]; then
    return
  fi
  running="stage $number, $title"
  say "stage $number: $title"
  "$@"
  say "stage $number: done in $((SECONDS - start)) s"
  running=''
}

# At exit: names the stage that did not come to its end.
report_failure() {
  local status=$?
  [ -z "$running" ] ||
    printf 'error: %s: %s failed (exit code %d)\n' "$language" "$running" "$status" >&2
}

say() {
  printf '%(%Y-%m-%d %H:%M:%S)T %s: %s\n' -1 "$language" "$*" | tee -a "$exp/log/run.log"
}

if $help; then
  usage
  exp='exp/<name>'
else
  # shellcheck source=tools/environment.sh
  source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
  activate_environment "$(dirname "$(dirname "$recipe")")"
  trap report_failure EXIT
  cd "$recipe" || die "$recipe is gone"
  exp=$(python -m icetransfer.experiment "${resolve[@]}" "language=$language" \
    ${settings[@]+"${settings[@]}"})
  # shellcheck disable=SC2034
  data=$(python - "$exp/config.yaml" <<'PYTHON'
import sys, yaml
print(yaml.safe_load(open(sys.argv[1], encoding="utf-8"))["data"]["dir"])
PYTHON
  )
  mkdir -p "$exp/log"
fi
