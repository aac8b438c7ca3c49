#!/usr/bin/env bash
#SBATCH --job-name=retrieval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=7-00:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
# A retrieval server for several jobs, until it is cancelled. It listens on the node's own address, and says which.
#   sbatch slurm/retrieval.sh --corpus FILE [--index DIR] [--port P] [--token-file FILE] ...
set -euo pipefail
. slurm/job.sh
[ $# -ge 1 ] || fail "no corpus; sbatch slurm/retrieval.sh --corpus FILE [--index DIR] [--port P]"
run_ranks tools/retrieval_server.py --host "$(node_address "$HEAD_NODE")" "$@"
