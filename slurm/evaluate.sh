#!/usr/bin/env bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
# Score a checkpoint on question sets (docs/evaluation.md). Shortly before its time limit, the job saves its answers and
# requeues itself.
#   sbatch slurm/evaluate.sh --config runs/NAME/config.yaml --checkpoint runs/NAME/checkpoints/best [--sets A=FILE,...] ...
set -euo pipefail
. slurm/job.sh
[ $# -ge 1 ] || fail "sbatch slurm/evaluate.sh --config CONFIG --checkpoint PATH [...]"
# For `finish`: the progress of this job is its number of answers.
furthest_step() { { echo 0; grep -oE 'stopped at answer [0-9]+' "$LOGS/rank_0.log" || true; } | grep -oE '[0-9]+' | sort -n | tail -n 1; }
start_retrieval
code=0
run_ranks tools/evaluate.py "$@" ${SEARCH[@]+"${SEARCH[@]}"} || code=$?
stop_retrieval
finish "$code"
