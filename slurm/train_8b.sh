#!/usr/bin/env bash
#SBATCH --job-name=train_8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@900
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
# Train an 8B model on one node of 8 H100 (docs/slurm.md).
#   sbatch [--nodes N] slurm/train_8b.sh [CONFIG] [section.field=value ...]
set -euo pipefail
. slurm/job.sh
case "${1:-}" in
  "" | *=*) set -- configs/train_8b.yaml "$@" ;;
esac
train "$@"
