#!/usr/bin/env bash
#SBATCH --job-name=train_30b_a3b
#SBATCH --nodes=2
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
# Train Qwen3-30B-A3B on 2 nodes of 8 H100 (docs/slurm.md).
#   sbatch [--nodes N] slurm/train_30b_a3b.sh [CONFIG] [section.field=value ...]
set -euo pipefail
. slurm/job.sh
case "${1:-}" in
  "" | *=*) set -- configs/train_30b_a3b.yaml "$@" ;;
esac
train "$@"
