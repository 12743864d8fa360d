# shellcheck shell=bash
# Sourced by egs/*/run.sh: options, the environment, the experiment's config, and `stage`.
#
# A run.sh may use $data and $exp in the titles of its stages.  They are seen from where the user
# stands; stages run in the recipe's folder.

recipe=$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)
language=$(basename "$recipe")
first_stage=0 last_stage=11 help=false dry_run=false running='' running_stage='' gpus='' share=''
exp='' experiment='' # the experiment's folder, for the user and from the recipe's
called=("$0") # as it was called, without the stages
# Of a job step that srun started with several tasks: all of them train, the first does the rest.
tasks=${SLURM_STEP_NUM_TASKS:-1} task=0
if [ "$tasks" -gt 1 ]; then
  task=$SLURM_PROCID
fi
run_again=75 # exit code of a training that was stopped and continues with the same command
# shellcheck disable=SC2034 # for the titles of run.sh
data=data
resolve=(--conf conf/default.yaml)
settings=()

usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$recipe/run.sh"
  cat <<EOF

  --stage N, --stop-stage M  the first and the last stage to run (default 0 and 11)
  --init en|ml|random        what to start from
  --hours 8min|100h|100      how much training data (default: all)
  --seed N                   of initialisation, batches and augmentation
  --conf FILE                more settings, over conf/default.yaml; may be repeated
  --gpus N                   train with N processes on each node, each with a GPU where there are some
  --exp DIR                  experiment folder, relative to the recipe (default exp/<its name>)
  --change                   let settings change the course of a training that has begun
  --share K/N                with --stage and --stop-stage 1, or both 2: the Kth of N shares of the
                             stage's work, beside processes that do the others; afterwards the
                             same without --share does what is missing and joins it
  --dry-run                  print the commands of the stages, run nothing and write nothing
  key=value                  any setting, over all files, as in train.max_steps=500
  --help                     this

Reference: docs/config.md has every key, docs/architecture.md what each stage reads and writes.
Exit codes: 0 done, 2 a mistake that the message explains, 130 ended by Ctrl-C, $run_again stopped by
a signal in training with all saved: run the same command again.

stages:
EOF
}

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

stage_number() {
  [[ $2 =~ ^([0-9]|1[01])$ ]] || die "$1 takes a stage from 0 to 11, got '$2'"
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
  taken=("$1")
  case $1 in
    --help | -h) help=true ;;
    --dry-run) dry_run=true ;;
    --change) resolve+=(--change) ;;
    --stage | --stop-stage | --share | --init | --hours | --seed | --conf | --exp | --gpus)
      [ $# -ge 2 ] || die "$1 needs a value; see $0 --help"
      case $1 in
        --stage) first_stage=$(stage_number "$1" "$2") ;;
        --stop-stage) last_stage=$(stage_number "$1" "$2") ;;
        --share) share=$2 ;;
        --conf)
          file=$(conf_file "$2")
          resolve+=(--conf "$file")
          ;;
        --exp) resolve+=(--exp "$2") ;;
        --gpus)
          [[ $2 =~ ^[1-9][0-9]*$ ]] || die "--gpus takes a number from 1, got '$2'"
          gpus=$2
          ;;
        *) settings+=("${1#--}=$2") ;;
      esac
      taken+=("$2")
      shift
      ;;
    -*) die "unknown option $1; see $0 --help" ;;
    *=*) settings+=("$1") ;;
    *) die "expected an option or key=value, got '$1'; see $0 --help" ;;
  esac
  [[ ${taken[0]} == --s[th]* ]] || called+=("${taken[@]}")
  shift
done

if [ -n "$share" ] && [[ $first_stage-$last_stage != 1-1 && $first_stage-$last_stage != 2-2 ]]; then
  die "--share $share: stages 1 and 2 alone can be shared: add --stage 1 --stop-stage 1, or 2 and 2"
fi

if [ "$first_stage" -gt "$last_stage" ]; then
  die "--stage $first_stage --stop-stage $last_stage: no stage lies between them; the first comes first, as in \
--stage $last_stage --stop-stage $first_stage"
fi

py() {
  if [ "$1" = train ]; then
    train_processes
  elif [ -n "$share" ]; then
    python -m "icetransfer.$1" --exp "$experiment" --share "$share"
  else
    python -m "icetransfer.$1" --exp "$experiment"
  fi
}

# Training: one process, or with --gpus one for each GPU of each node, started by torchrun.
train_processes() {
  local status=0 stopped=$experiment/checkpoints/run-again
  local meet=(--standalone)
  if [ -z "$gpus" ]; then
    with_signals python -m icetransfer.train --exp "$experiment"
    return
  fi
  if [ "$tasks" -gt 1 ]; then
    [ "$tasks" = "$SLURM_STEP_NUM_NODES" ] || die "--gpus starts the processes of a node: give srun \
--ntasks-per-node=1, or leave --gpus out and let each of the $tasks tasks be a process"
    meet=(--nnodes "$tasks" --node-rank "$task" --master-port $((20000 + SLURM_JOB_ID % 20000)))
    meet+=(--master-addr "$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)")
  fi
  with_signals python -m torch.distributed.run "${meet[@]}" --nproc-per-node "$gpus" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 100 \
    -m icetransfer.train --exp "$experiment" || status=$?
  # torchrun has one exit code for all that can happen to its processes.
  if [ "$status" -ne 0 ] && [ -f "$stopped" ]; then
    return "$run_again"
  fi
  return "$status"
}

# Runs a command that is to hear of the signals that this script gets: on SIGTERM, SIGUSR1 (Slurm's
# warning) and Ctrl-C training saves and leaves with the exit code $run_again.
with_signals() {
  local child status=0
  "$@" &
  child=$!
  # shellcheck disable=SC2064 # the number of now
  trap "kill -TERM $child 2>/dev/null" TERM INT USR1
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the child
    status=0
    wait "$child" || status=$?
  done
  if [ "$status" -gt 128 ]; then # perhaps of such a signal: the child's own is remembered
    status=0
    wait "$child" || status=$?
  fi
  trap - TERM USR1
  trap 'exit 130' INT
  return "$status"
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
  elif [ "$task" -gt 0 ] && [ "$1 $2" != "py train" ]; then
    return
  elif $dry_run; then
    printf 'stage %d: %s\n' "$number" "$title"
    "$@"
    return
  fi
  running="stage $number, $title"
  running_stage=$number
  say "stage $number: $title"
  "$@"
  say "stage $number: done in $((SECONDS - start)) s"
  running=''
}

# At exit: what comes next, and of a stage that did not come to its end its name.
report_end() {
  local status=$?
  if [ -n "$running" ] && [ "$status" -eq "$run_again" ]; then
    printf '%s: %s was stopped by a signal; run the same command again to go on (exit code %d)\n' \
      "$language" "$running" "$status" >&2
  elif [ "$status" -eq 130 ]; then
    return
  elif [ -n "$running" ]; then
    # Only the stage knows what went wrong, and has said so.
    printf '%s: %s did not end (exit code %d); to go on from there: %s\n' \
      "$language" "$running" "$status" \
      "$(from_stage "$running_stage")${share:+ --stop-stage $running_stage --share $share}" >&2
  elif [ "$status" -eq 0 ] && [ "$last_stage" -lt 11 ] && [ "$task" -eq 0 ]; then
    if [ -n "$share" ]; then
      say "next, when all shares are done: $(from_stage "$last_stage")"
    else
      say "next: $(from_stage $((last_stage + 1)))"
    fi
  fi
}

# Prints the command as it was called, but from a stage on.
from_stage() {
  printf '%q ' "${called[@]}"
  printf -- '--stage %d' "$1"
}

# Prints a path of the recipe as it is from where the user stands.
seen_from_here() {
  case $1 in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$place$1" ;;
  esac
}

say() {
  printf '%(%Y-%m-%d %H:%M:%S)T %s: %s\n' -1 "$language" "$*" | tee -a "$experiment/log/run.log"
}

if $help; then
  usage
  exp='exp/<name>'
else
  # shellcheck source=tools/environment.sh
  source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
  activate_environment "$(dirname "$(dirname "$recipe")")"
  export ICETRANSFER_CALLED_FROM=$PWD # messages name paths as they are from here
  place=$(realpath --relative-to=. -- "$recipe")/
  [ "$place" != ./ ] || place=''
  cd "$recipe" || die "$recipe is gone"
  if $dry_run; then
    resolve+=(--dry-run)
  fi
  folders=$(python -m icetransfer.experiment "${resolve[@]}" "language=$language" \
    ${settings[@]+"${settings[@]}"})
  experiment=${folders%%$'\n'*}
  # shellcheck disable=SC2034 # for the titles of run.sh
  exp=$(seen_from_here "$experiment")
  # shellcheck disable=SC2034
  data=$(seen_from_here "${folders##*$'\n'}")
  if $dry_run; then
    printf 'in %s:\n' "$recipe"
    python() {
      printf '  python'
      printf ' %q' "$@"
      printf '\n'
    }
  else
    trap report_end EXIT
    trap 'exit 130' INT # Ctrl-C, of which the stage has said what there is to say
    mkdir -p "$experiment/log"
  fi
fi
