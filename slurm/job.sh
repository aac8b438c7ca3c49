# shellcheck shell=bash
# Common code of all jobs in this folder. A job sources it in the folder where sbatch was called.
#
# Every argument is passed to the program unchanged, so no shell interprets a path or an override.
# Environment (all optional):
#   PYTHON             interpreter on every node                                  [.venv/bin/python]
#   CONTAINER          image.sqsh or registry reference (enroot/pyxis), or image.sif (Apptainer)
#   CONTAINER_MOUNTS   mounts in addition to this folder and the link targets in its models, data and runs, as a:b,c:d
#   CACHE              folder on each node for compiled kernels                   [$TMPDIR/a2tgpo-UID]
#   RETRIEVAL_CORPUS   JSONL of passages, served on the job's first node during training
#   RETRIEVAL_INDEX    folder made by tools/build_index.py, or bm25               [bm25]
#   RETRIEVAL_SHARDS=1 RETRIEVAL_INDEX contains part-0, part-1, ...; each of the job's nodes serves one part
#   RETRIEVAL_CPUS     CPUs of each server, shared with its node's ranks          [all CPUs of the job on that node]
#   RETRIEVAL_PORT     port of that server; the shards' ports follow              [20000 + job id % 10000]
#   RETRIEVAL_WAIT_S   longest time until the server answers                      [1800]
#   DRY_RUN=1          check configuration, files and plan on the job's first node, then end
#   MAX_REQUEUES       requeues in a row without a new furthest step              [3]
# At its first start, a job copies this folder's programs to runs/slurm/JOB/code, and its configuration to
# runs/slurm/JOB/config.yaml. A requeued job continues with these copies, even if files were edited or another commit was
# checked out in the meantime. Edits between sbatch and the first start take effect; the log names the edited files.
# Exit codes of the program: 0 means done, 2 a mistake in the configuration, 3 that the run failed or its guards stopped it.
# 75 means that the run was saved because of a signal or the job's time limit; the job then requeues itself and continues.
set -euo pipefail

SAVED=75
fail() { echo "slurm: $*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a job: sbatch slurm/$(basename "$0") [CONFIG] [section.field=value ...]"
[ -f launch/train.py ] || fail "call sbatch in the project's folder (launch/train.py is not in $PWD)"
# JOB is the name of this job for squeue and scontrol. One task of an array has the SLURM_JOB_ID of the whole array, which refers
# to all tasks. A job that an array's task submits inherits the array's variables, but is not a task of the array.
JOB="$SLURM_JOB_ID"
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && ! scontrol show job "$JOB" --oneliner | grep "^JobId=$JOB JobName=" >/dev/null; then
  JOB="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
job_field() { scontrol show job "$JOB" --oneliner | sed -n "s/.* $1=\([^ ]*\).*/\1/p" | sed 's/^(null)$//' || true; }
LOGS="runs/slurm/$JOB"
CODE="$LOGS/code"

# Print the commit in the format of a2tgpo/run/versions.py.
commit_line() {
  local commit changed=""
  commit="$(git -c safe.directory='*' rev-parse HEAD 2>/dev/null)" || { echo unknown; return; }
  if [ -n "$(git -c safe.directory='*' status --porcelain -- a2tgpo launch)" ]; then changed=" with uncommitted changes"; fi
  echo "$commit$changed"
}

# Copy the current programs and the batch script to the folder CODE, atomically.
copy_code() {
  rm -rf "$CODE.unfinished"
  mkdir -p "$CODE.unfinished"
  local part
  for part in a2tgpo launch slurm tools; do
    if [ -d "$part" ]; then cp -Rp "$part" "$CODE.unfinished"; fi
  done
  if [ -f "$0" ]; then cp "$0" "$CODE.unfinished/job_script.sh"; fi
  commit_line >"$CODE.unfinished/COMMIT"
  mv "$CODE.unfinished" "$CODE"
}

# edited_after TIME [ARGUMENT ...]: list all files that were modified after the second TIME, among the copied programs, configs/
# and the arguments that are files. The copies have the modification times of the originals.
edited_after() {
  local since argument places=(configs)
  since="$(date -d "$1" +%s)" || return 0
  for argument in "${@:2}"; do if [ -f "$argument" ]; then places+=("$argument"); fi; done
  { (cd "$CODE" && younger_than "$since" a2tgpo launch slurm tools); younger_than "$since" "${places[@]}"; } | sort -u
}
younger_than() { find "${@:2}" -type f -newermt "@$(($1 + 1))" ! -name '*.pyc' 2>/dev/null || true; }

# Report what the job copies at its first start, and which files were edited while it waited, as Slurm keeps only the batch script.
report_start() {
  local submitted edited more=""
  submitted="$(job_field SubmitTime)"
  echo "slurm: first start: the job keeps this folder's code, $(cat "$CODE/COMMIT"), and its configuration in their present state"
  edited="$(edited_after "${submitted:-now}" "$@")"
  if [ -z "$edited" ]; then return; fi
  if [ "$(wc -l <<<"$edited")" -gt 5 ]; then more=" and $(($(wc -l <<<"$edited") - 5)) more"; fi
  echo "slurm: edited after the job was submitted ($submitted), and used: $(head -n 5 <<<"$edited" | paste -sd ' ')$more"
}

if [ "${BASH_SOURCE[0]}" != "$CODE/slurm/job.sh" ]; then
  # An earlier job may have had the same number. Remove the earlier job's code, configuration and requeue count. FIRST_BYTE
  # skips its steps in the log.
  if [ "$(job_field Restarts)" = 0 ]; then rm -rf "$CODE" "$LOGS/config.yaml" "$LOGS/requeues"; fi
  if [ ! -d "$CODE" ]; then
    copy_code
    report_start "$@"
  elif [ "$(commit_line)" != "$(cat "$CODE/COMMIT")" ]; then
    echo "slurm: this folder is now at $(commit_line); the job continues with the code of its first start, $CODE: $(cat "$CODE/COMMIT")"
  fi
  . "$CODE/slurm/job.sh"
  return
fi

# Unset variables that a launcher or another job left in the submitting shell. The ranks would take them for this job's variables.
for name in RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT $(compgen -e PET_) $(compgen -e TORCHELASTIC_); do unset "$name"; done
. "$CODE/slurm/nccl.sh"
# Pass --cpus-per-task on to srun. Since Slurm 22.05, srun does not inherit it from sbatch, and every rank would run on one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
# Let Python import the job's own copy of the package instead of the installed package.
export PYTHONPATH="$PWD/$CODE${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
PYTHON="${PYTHON:-.venv/bin/python}"
# Keep compiled kernels and other caches on the node. If they were in one folder of a network file system, all ranks of a job
# would wait for each other's locks.
CACHE="${CACHE:-${TMPDIR:-/tmp}/a2tgpo-$(id -u)}"
export VLLM_CACHE_ROOT="${VLLM_CACHE_ROOT:-$CACHE/vllm}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$CACHE/triton}" \
  TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$CACHE/inductor}" FLASHINFER_WORKSPACE_BASE="${FLASHINFER_WORKSPACE_BASE:-$CACHE}"
HEAD_NODE="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
mkdir -p "$LOGS"
: >>"$LOGS/rank_0.log"
FIRST_BYTE=$(($(stat -c %s "$LOGS/rank_0.log") + 1))

# If a container is requested, SRUN_CONTAINER has options for srun, or IN_CONTAINER has a prefix for the program.
SRUN_CONTAINER=() IN_CONTAINER=()
# Mount the targets of links at the same paths, because otherwise links that point out of this folder are broken in the container.
MOUNTS="${CONTAINER_MOUNTS:-}"
for link in models data runs models/* data/*; do
  if [ -L "$link" ] && target="$(readlink -e "$link")"; then MOUNTS="${MOUNTS:+$MOUNTS,}$target:$target"; fi
done
case "${CONTAINER:-}" in
  '') ;;
  *.sif) IN_CONTAINER=(apptainer exec --bind "$PWD${MOUNTS:+,$MOUNTS}" --pwd "$PWD")
         if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then IN_CONTAINER+=(--nv); fi
         IN_CONTAINER+=("$CONTAINER") ;;
  *) SRUN_CONTAINER=("--container-image=$CONTAINER" "--container-mounts=$PWD:$PWD${MOUNTS:+,$MOUNTS}"
                     "--container-workdir=$PWD") ;;
esac

# run_ranks PROGRAM [ARGUMENT ...]: run a program on every rank. Each rank has a log file. The job also prints rank 0's output.
# If a rank fails, the other ranks have a minute to save, or to report what they saw.
run_ranks() {
  local code=0
  tail -c "+$FIRST_BYTE" -F "$LOGS/rank_0.log" 2>/dev/null & local tail_pid=$!
  srun --kill-on-bad-exit=0 --wait=60 --output="$LOGS/rank_%t.log" --open-mode=append \
    ${SRUN_CONTAINER[@]+"${SRUN_CONTAINER[@]}"} ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} "$PYTHON" "$CODE/$1" "${@:2}" &
  SRUN_PID=$!
  # A trapped signal interrupts `wait`, so repeat it until srun has ended.
  while true; do
    code=0; wait "$SRUN_PID" || code=$?
    kill -0 "$SRUN_PID" 2>/dev/null || break
  done
  IS_FINISHING=yes SRUN_PID=""
  sleep 1; kill "$tail_pid" 2>/dev/null || true
  return "$code"
}

# Slurm sends a signal to this script before the time limit (--signal=B:USR1@...) or a preemption. srun passes it on to all ranks.
SRUN_PID="" IS_FINISHING=no
pass_on() { if [ -n "$SRUN_PID" ]; then kill "-$1" "$SRUN_PID" 2>/dev/null || true; elif [ "$IS_FINISHING" = no ]; then finish "$SAVED"; fi; }
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

# Start a retrieval server on the first node. With RETRIEVAL_SHARDS=1, also start a server on every node, which the first server
# queries. Set SEARCH to the overrides with the first server's address.
SEARCH=() RETRIEVAL_PIDS=()
start_retrieval() {
  [ -n "${RETRIEVAL_CORPUS:-}" ] || return 0
  [ -r "$RETRIEVAL_CORPUS" ] || fail "RETRIEVAL_CORPUS is $RETRIEVAL_CORPUS; allowed: a JSONL file that every node can read"
  local port="${RETRIEVAL_PORT:-$((20000 + SLURM_JOB_ID % 10000))}" index="${RETRIEVAL_INDEX:-bm25}" address shards=""
  address="$(node_address "$HEAD_NODE")"
  if [ "${RETRIEVAL_SHARDS:-}" = 1 ]; then
    start_shards "$index" "$((port + 1))"
    keep_serving retrieval "$HEAD_NODE" --shards "$shards" --host "$address" --port "$port" &
  else
    keep_serving retrieval "$HEAD_NODE" --corpus "$RETRIEVAL_CORPUS" --index "$index" --host "$address" --port "$port" &
  fi
  RETRIEVAL_PIDS+=("$!")
  await_health "http://$address:$port/health" "${RETRIEVAL_WAIT_S:-1800}" retrieval
  SEARCH=(search.backend=http "search.url=http://$address:$port/retrieve" search.url_file=)
}

# start_shards FOLDER PORT: serve FOLDER/part-I on node I, for all nodes, and append the addresses to the caller's `shards`.
start_shards() {
  local node number=0 address
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    [ -d "$1/part-$number" ] || fail "RETRIEVAL_SHARDS: there is no $1/part-$number; build one part for each of the $SLURM_JOB_NUM_NODES nodes with tools/build_index.py --part I/$SLURM_JOB_NUM_NODES"
    [ ! -d "$1/part-$SLURM_JOB_NUM_NODES" ] || fail "RETRIEVAL_SHARDS: $1 has more parts than the $SLURM_JOB_NUM_NODES nodes, which must serve all of them"
    address="$(node_address "$node")"
    # Give every server its own port, because several nodes may be on one machine (dev_cluster.sh).
    keep_serving "shard_$number" "$node" --corpus "$RETRIEVAL_CORPUS" --index "$1/part-$number" --host "$address" --port "$(($2 + number))" &
    RETRIEVAL_PIDS+=("$!")
    shards="${shards:+$shards,}http://$address:$(($2 + number))/retrieve"
    number=$((number + 1))
  done
  for number in "${!RETRIEVAL_PIDS[@]}"; do
    address="$(cut -d, -f $((number + 1)) <<<"$shards")"
    await_health "${address%/retrieve}/health" "${RETRIEVAL_WAIT_S:-1800}" "shard_$number"
  done
}

# keep_serving NAME NODE OPTION ...: run a retrieval server on NODE, and restart it when it dies, until TERM. If the server ends
# with 2 before it has ever served, stop. If it ends with 2 later, restart it, because a shard may just be restarting.
keep_serving() {
  local name="$1" node="$2" code pid=""
  shift 2
  trap 'kill "$pid" 2>/dev/null; wait "$pid" 2>/dev/null; exit 0' TERM
  trap '' USR1
  while true; do
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --gpus=0 --cpus-per-task="${RETRIEVAL_CPUS:-$SLURM_CPUS_ON_NODE}" \
      --output="$LOGS/$name.log" --open-mode=append ${SRUN_CONTAINER[@]+"${SRUN_CONTAINER[@]}"} \
      ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} "$PYTHON" "$CODE/tools/retrieval_server.py" "$@" &
    pid=$!
    code=0; wait "$pid" || code=$?
    if [ "$code" = 2 ] && ! grep -q 'listening on http' "$LOGS/$name.log"; then exit 2; fi
    echo "slurm: $name on $node ended with $code; restarting it" >&2
    sleep 2
  done
}

stop_retrieval() {
  local pid
  for pid in ${RETRIEVAL_PIDS[@]+"${RETRIEVAL_PIDS[@]}"}; do kill "$pid" 2>/dev/null || true; done
  for pid in ${RETRIEVAL_PIDS[@]+"${RETRIEVAL_PIDS[@]}"}; do wait "$pid" 2>/dev/null || true; done
}

node_address() { scontrol show node "$1" --oneliner | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'; }

# await_health URL SECONDS NAME: wait until server NAME answers. End the job if the server ends or does not answer in SECONDS.
await_health() {
  local url="$1" end=$((SECONDS + $2)) pid="${RETRIEVAL_PIDS[-1]}"
  if [[ "$3" == shard_* ]]; then pid="${RETRIEVAL_PIDS[${3#shard_}]}"; fi
  until curl --silent --fail --max-time 5 --output /dev/null "$url"; do
    kill -0 "$pid" 2>/dev/null || { echo "slurm: the retrieval server has ended; the last lines of $LOGS/$3.log:" >&2
                                    tail -n 3 "$LOGS/$3.log" >&2; stop_retrieval; exit 3; }
    [ "$SECONDS" -lt "$end" ] || { stop_retrieval; fail "$url did not answer within $2 s; see $LOGS/$3.log"; }
    sleep 1
  done
  echo "slurm: retrieval server at $url"
}

# train CONFIG [OVERRIDE ...], warm_start CONFIG [OVERRIDE ...]: run the program, then requeue the job or exit; or make a dry run.
train() { run_or_requeue launch/train.py "$@"; }
warm_start() { run_or_requeue launch/warmstart.py "$@"; }

run_or_requeue() {
  local program="$1"; shift
  [ $# -ge 1 ] || fail "no configuration; sbatch slurm/NAME.sh [CONFIG] [section.field=value ...]"
  [ -f "$1" ] || fail "there is no configuration $1 in $PWD"
  if [ "${DRY_RUN:-}" = 1 ]; then
    # A dry run checks the layout of the whole job, even if this allocation is smaller.
    local code=0
    srun --nodes=1 --ntasks=1 --nodelist="$HEAD_NODE" ${SRUN_CONTAINER[@]+"${SRUN_CONTAINER[@]}"} \
      ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} "$PYTHON" "$CODE/$program" --config "$1" --dry-run "${@:2}" || code=$?
    exit "$code"
  fi
  if [ "$program" = launch/train.py ]; then start_retrieval; fi
  local code=0
  run_ranks "$program" --config "$1" --as-started "$LOGS/config.yaml" --resume auto "${@:2}" ${SEARCH[@]+"${SEARCH[@]}"} || code=$?
  stop_retrieval
  finish "$code"
}

# finish CODE: requeue the job if it should continue, and exit with CODE.
finish() {
  IS_FINISHING=yes
  local bad="" excluded="" with="" state
  state="$(squeue --noheader --jobs="$JOB" --format=%T 2>/dev/null || true)"
  if [ "$1" != 0 ] && [ "$state" != RUNNING ]; then exit "$1"; fi  # cancelled: do not requeue
  case "$1" in
    0 | 2) exit "$1" ;;
    "$SAVED") ;;
    *) bad="$(failing_nodes)"
       if [ -z "$bad" ]; then echo "slurm: ended with $1; see $LOGS" >&2; exit "$1"; fi ;;
  esac
  local mark="$LOGS/requeues" newest last=0 count=0
  newest="$(furthest_step)"
  if [ -f "$mark" ]; then read -r last count <"$mark"; fi
  if [ "$newest" -gt "$last" ]; then last="$newest" count=0; fi
  count=$((count + 1))
  if [ "$count" -gt "${MAX_REQUEUES:-3}" ]; then
    echo "slurm: ${MAX_REQUEUES:-3} requeues without a step after $last: not requeued" >&2
    exit 3
  fi
  echo "$last $count" >"$mark"
  if [ -n "$bad" ]; then
    excluded="$(exclusion "$bad")"
    with=" without $bad"
    if [ -z "$excluded" ]; then with="; $bad is not excluded, since the job could not start without it"; fi
  fi
  echo "slurm: ended with $1 after step $last; requeued$with"
  trap '' TERM  # ignore TERM, which the next command sends to this script
  if [ -z "$excluded" ]; then
    scontrol requeue "$JOB"
  else
    # Slurm can change the excluded nodes only while a job waits.
    scontrol requeuehold "$JOB"
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      scontrol update "JobId=$JOB" "ExcNodeList=$excluded" 2>/dev/null && break
      sleep 1
    done
    scontrol release "$JOB"
  fi
  exit "$1"
}

# Print the furthest step that rank 0 has reported since this start of the job, or 0.
furthest_step() {
  { echo 0; tail -c "+$FIRST_BYTE" "$LOGS/rank_0.log" | grep -oE 'step [0-9]+(/| of )' || true; } | grep -oE '[0-9]+' | sort -n | tail -n 1
}

# exclusion BAD: print the nodes to exclude, comma-separated, which are BAD and the nodes that the job already excludes. Print
# nothing if the job requires a node of BAD by name, or if the partition would have too few nodes left, because Slurm would
# then report a bad constraint and never start the job.
exclusion() {
  local nodes up
  nodes="$(job_field ExcNodeList)"
  nodes="${nodes:+$nodes,}$1"
  if host_names "$(job_field ReqNodeList)" | grep -qxF -f <(host_names "$1"); then return; fi
  up="$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %T' |
    awk '$2 ~ /^(idle|mixed|allocated|completing|planned)[-+~#]?$/ {print $1}' |
    grep -vxFc -f <(host_names "$nodes"))" || true
  if [ "${up:-0}" -ge "$SLURM_JOB_NUM_NODES" ]; then echo "$nodes"; fi
}

host_names() { if [ -n "$1" ]; then scontrol show hostnames "$1"; fi; }

# Print the job's nodes that are down, that cannot start a process, or whose GPU driver does not answer, comma-separated.
failing_nodes() {
  local node check="true" bad=()
  declare -A attempts
  if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then check="nvidia-smi"; fi
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    case "$(sinfo --noheader --nodes="$node" --format=%T | head -n 1)" in
      down* | drain* | fail* | *'*') bad+=("$node") ;;
      *) timeout 60 srun --overlap --immediate=30 --nodes=1 --ntasks=1 --nodelist="$node" "$check" >/dev/null 2>&1 &
         attempts["$node"]=$! ;;
    esac
  done
  for node in "${!attempts[@]}"; do wait "${attempts[$node]}" || bad+=("$node"); done
  (IFS=,; echo "${bad[*]-}")
}
