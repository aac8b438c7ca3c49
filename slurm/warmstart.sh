#!/usr/bin/env bash
#SBATCH --job-name=warmstart
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
# Run a supervised warm start on demonstrations, before training (docs/warmstart.md).
#   sbatch [--nodes N] slurm/warmstart.sh CONFIG [section.field=value ...]
set -euo pipefail
. slurm/job.sh
warm_start "$@"
