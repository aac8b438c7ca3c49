#!/usr/bin/env bash
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
# Convert a checkpoint to a Hugging Face folder, or a Hugging Face folder to a checkpoint (docs/evaluation.md).
#   sbatch slurm/convert.sh megatron-to-hf --in runs/NAME/checkpoints/best --out models/trained
#   sbatch slurm/convert.sh hf-to-megatron --in models/trained --out checkpoints --config runs/NAME/config.yaml
set -euo pipefail
. slurm/job.sh
[ $# -ge 1 ] || fail "sbatch slurm/convert.sh megatron-to-hf|hf-to-megatron --in PATH --out FOLDER [...]"
run_ranks tools/convert.py "$@"
