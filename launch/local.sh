#!/usr/bin/env bash
# Start a run on this machine: one process per GPU, or RANKS processes on its CPUs.
#   launch/local.sh -n RANKS [--script launch/warmstart.py] CONFIG [--dry-run] [--resume auto|PATH|none] [--accept-changes] [FILE.yaml | section.field=value ...]
set -euo pipefail
usage() { sed -n '3p' "$0" | cut -c3- >&2; exit 2; }

ranks="" script="$(dirname "$0")/train.py"
while [ $# -gt 0 ]; do
  case "$1" in
    -n) [ $# -ge 2 ] || usage; ranks="$2"; shift 2 ;;
    --script) [ $# -ge 2 ] || usage; script="$2"; shift 2 ;;
    -*) usage ;;
    *) break ;;
  esac
done
[ $# -ge 1 ] || usage
case "$ranks" in ''|*[!0-9]*|0) echo "launch/local.sh: -n needs the number of processes, got '$ranks'" >&2; exit 2 ;; esac
config="$1"; shift

# If several processes share few cores, their thread pools spin and slow each other down many times over.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONUNBUFFERED=1
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
# Python must import the package of this checkout, even if another one is installed.
export PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m a2tgpo.launch.local_ranks "$ranks" "$script" --config "$config" "$@"
