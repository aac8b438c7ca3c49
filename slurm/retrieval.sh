#!/usr/bin/env bash
#SBATCH --job-name=retrieval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=7-00:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
# Run a retrieval server for other jobs until this job is cancelled. The job requeues itself before its time limit and if the server
# dies. The server listens on the node's address and any free port, and writes both to runs/retrieval.url (search.url_file).
#   sbatch slurm/retrieval.sh --corpus FILE [--index DIR] [--port P] [--url-file FILE] [--token-file FILE] ...
set -euo pipefail
. slurm/job.sh
[ $# -ge 1 ] || fail "no corpus; sbatch slurm/retrieval.sh --corpus FILE [--index DIR] [--port P]"
# For `finish`: the progress of this job is the number of its starts in which the server answered.
furthest_step() { grep -c 'listening on http' "$LOGS/rank_0.log" || true; }
code=0
run_ranks tools/retrieval_server.py --host "$(node_address "$HEAD_NODE")" --port 0 --url-file runs/retrieval.url "$@" || code=$?
case "$code" in 0 | 2) ;; *) echo "slurm: the server ended with $code"; code="$SAVED" ;; esac
finish "$code"
