#!/usr/bin/env bash
#SBATCH --job-name=smoke_cpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
# Train the quickstart's model on two nodes without GPUs, to try a Slurm installation. Run `make quickstart` before.
#   sbatch slurm/smoke_cpu.sh [CONFIG] [section.field=value ...]
set -euo pipefail
. slurm/job.sh
case "${1:-}" in
  "" | *=*) set -- configs/quickstart.yaml "$@" ;;
esac
train "$@"
