#!/bin/bash
# What sbatch starts: slurm_job.sh ROOT JOBS.json runs job $SLURM_ARRAY_TASK_ID of the file.
# Slurm runs a copy, hence ROOT, the folder of the repository; --output would expand the % of a path.
set -euo pipefail
exec >>"${2%.json}-$SLURM_ARRAY_TASK_ID.log" 2>&1
# shellcheck source=tools/environment.sh
source "$1/tools/environment.sh"
activate_environment "$1"
exec python -m icetransfer.sweep.slurm "$2"
