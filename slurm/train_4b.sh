#!/usr/bin/env bash
#SBATCH --job-name=train_4b
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
# Train a 4B model with the paper's settings on one node of 8 H100 (docs/slurm.md).
#   sbatch [--nodes N] slurm/train_4b.sh [CONFIG] [section.field=value ...]
set -euo pipefail
. slurm/job.sh
case "${1:-}" in
  "" | *=*) set -- configs/train_4b.yaml "$@" ;;
esac
train "$@"
