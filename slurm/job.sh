# shellcheck shell=bash
# What the jobs of this folder share; sourced by them, in the folder that sbatch was called in.
#
# Arguments are handed on as they are, one by one: nothing in a path or an override is ever read by a shell.
# Environment (all optional):
#   PYTHON             interpreter on every node                                  [.venv/bin/python]
#   CONTAINER          image.sqsh or registry reference (enroot/pyxis), or image.sif (Apptainer)
#   CONTAINER_MOUNTS   what the container sees besides this folder and what its models, data and runs link to, as a:b,c:d
#   CACHE              folder of each node for compiled kernels                   [$TMPDIR/a2tgpo-UID]
#   RETRIEVAL_CORPUS   JSONL of passages: serve it on the job's first node, beside the training
#   RETRIEVAL_INDEX    folder made by tools/build_index.py, or bm25               [bm25]
#   RETRIEVAL_SHARDS=1 RETRIEVAL_INDEX holds part-0, part-1, ..., one for each of the job's nodes, which serves it
#   RETRIEVAL_CPUS     of each server, shared with the ranks of its node          [all of the job's on that node]
#   RETRIEVAL_PORT     of that server, and the next one of the shards'            [20000 + job id % 10000]
#   RETRIEVAL_WAIT_S   longest time until it answers                              [1800]
#   DRY_RUN=1          check configuration, files and plan on the job's first node, then end
#   MAX_REQUEUES       requeues in a row without a step further than before       [3]
# A job is what it was first started as: runs/slurm/JOB/code is a copy of this folder's programs from its first start, and
# runs/slurm/JOB/config.yaml the configuration; a requeue goes on with both, whatever is edited or checked out meanwhile.
# Edits between sbatch and the first start count; the log names the files.
# Exit codes of the program: 0 done, 2 a mistake in the configuration, 3 the run failed or its guards stopped it,
# 75 saved because of a signal or the job's end: the job is put into the queue again and goes on by itself.
set -euo pipefail

SAVED=75
fail() { echo "slurm: $*" >&2; exit 2; }

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a job: sbatch slurm/$(basename "$0") [CONFIG] [section.field=value ...]"
[ -f launch/train.py ] || fail "call sbatch in the project's folder (launch/train.py is not in $PWD)"
# How squeue and scontrol call this job. One task of an array has the SLURM_JOB_ID of the whole array, which would mean all its
# tasks. A job that such a task submits inherits the array's variables, though it is none of its tasks.
JOB="$SLURM_JOB_ID"
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && ! scontrol show job "$JOB" --oneliner | grep "^JobId=$JOB JobName=" >/dev/null; then
  JOB="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
job_field() { scontrol show job "$JOB" --oneliner | sed -n "s/.* $1=\([^ ]*\).*/\1/p" | sed 's/^(null)$//' || true; }
LOGS="runs/slurm/$JOB"
CODE="$LOGS/code"

# What a commit is called in a2tgpo/run/versions.py.
commit_line() {
  local commit changed=""
  commit="$(git -c safe.directory='*' rev-parse HEAD 2>/dev/null)" || { echo unknown; return; }
  if [ -n "$(git -c safe.directory='*' status --porcelain -- a2tgpo launch)" ]; then changed=" with uncommitted changes"; fi
  echo "$commit$changed"
}

# The programs as they are now, whole or not at all, and the batch script.
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

# edited_after TIME [ARGUMENT ...]: the programs as they were copied, the configurations, and the arguments that are files,
# which are younger than TIME, whose second is the last that does not count. Copies keep their times.
edited_after() {
  local since argument places=(configs)
  since="$(date -d "$1" +%s)" || return 0
  for argument in "${@:2}"; do if [ -f "$argument" ]; then places+=("$argument"); fi; done
  { (cd "$CODE" && younger_than "$since" a2tgpo launch slurm tools); younger_than "$since" "${places[@]}"; } | sort -u
}
younger_than() { find "${@:2}" -type f -newermt "@$(($1 + 1))" ! -name '*.pyc' 2>/dev/null || true; }

# What the job takes over at its first start, and what of it was edited while the job waited: Slurm keeps the batch script alone.
tell_start() {
  local submitted edited more=""
  submitted="$(job_field SubmitTime)"
  echo "slurm: first start: the job takes over this folder's code, $(cat "$CODE/COMMIT"), and its configuration as they are now"
  edited="$(edited_after "${submitted:-now}" "$@")"
  if [ -z "$edited" ]; then return; fi
  if [ "$(wc -l <<<"$edited")" -gt 5 ]; then more=" and $(($(wc -l <<<"$edited") - 5)) more"; fi
  echo "slurm: edited after the job was submitted ($submitted), and followed: $(head -n 5 <<<"$edited" | paste -sd ' ')$more"
}

if [ "${BASH_SOURCE[0]}" != "$CODE/slurm/job.sh" ]; then
  # An earlier job may have had this number: its code and configuration are not this one's, its requeues and the steps in
  # its part of the log do not count.
  if [ "$(job_field Restarts)" = 0 ]; then rm -rf "$CODE" "$LOGS/config.yaml" "$LOGS/requeues"; fi
  if [ ! -d "$CODE" ]; then
    copy_code
    tell_start "$@"
  elif [ "$(commit_line)" != "$(cat "$CODE/COMMIT")" ]; then
    echo "slurm: this folder is now at $(commit_line); the job goes on with the code of its first start, $CODE: $(cat "$CODE/COMMIT")"
  fi
  . "$CODE/slurm/job.sh"
  return
fi

# What a launcher or another job left in the submitting shell would be taken for this job's own.
for name in RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT $(compgen -e PET_) $(compgen -e TORCHELASTIC_); do unset "$name"; done
. "$CODE/slurm/nccl.sh"
# Since Slurm 22.05 srun does not inherit sbatch's --cpus-per-task: every rank would run on one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
# The package of the job's own copy, whichever is installed.
export PYTHONPATH="$PWD/$CODE${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
PYTHON="${PYTHON:-.venv/bin/python}"
# What ranks compile, or find out about a model, is kept on the node: all ranks of a job in one folder of a network
# file system wait for each other's locks.
CACHE="${CACHE:-${TMPDIR:-/tmp}/a2tgpo-$(id -u)}"
export VLLM_CACHE_ROOT="${VLLM_CACHE_ROOT:-$CACHE/vllm}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$CACHE/triton}" \
  TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$CACHE/inductor}" FLASHINFER_WORKSPACE_BASE="${FLASHINFER_WORKSPACE_BASE:-$CACHE}"
HEAD_NODE="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
mkdir -p "$LOGS"
: >>"$LOGS/rank_0.log"
FIRST_BYTE=$(($(stat -c %s "$LOGS/rank_0.log") + 1))

# Before and after srun's program: a container, if one is asked for.
SRUN_CONTAINER=() IN_CONTAINER=()
# A link that leads out of this folder leads nowhere in the container, unless its target is there at the same place.
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

# run_ranks PROGRAM [ARGUMENT ...]: one program on every rank, its output in a file for each; the first rank's is the job's
# own as well.
# A rank that has failed leaves the others a minute to end by themselves: to save, or to say what they saw.
run_ranks() {
  local code=0
  tail -c "+$FIRST_BYTE" -F "$LOGS/rank_0.log" 2>/dev/null & local tail_pid=$!
  srun --kill-on-bad-exit=0 --wait=60 --output="$LOGS/rank_%t.log" --open-mode=append \
    ${SRUN_CONTAINER[@]+"${SRUN_CONTAINER[@]}"} ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} "$PYTHON" "$CODE/$1" "${@:2}" &
  SRUN_PID=$!
  # A trapped signal interrupts wait: ask again until srun has ended.
  while true; do
    code=0; wait "$SRUN_PID" || code=$?
    kill -0 "$SRUN_PID" 2>/dev/null || break
  done
  IS_FINISHING=yes SRUN_PID=""
  sleep 1; kill "$tail_pid" 2>/dev/null || true
  return "$code"
}

# Slurm signals this script (--signal=B:USR1@..., preemption); srun hands the signal on to all ranks.
SRUN_PID="" IS_FINISHING=no
pass_on() { if [ -n "$SRUN_PID" ]; then kill "-$1" "$SRUN_PID" 2>/dev/null || true; elif [ "$IS_FINISHING" = no ]; then finish "$SAVED"; fi; }
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

# The retrieval server on the first node, or one on every node and one on the first that asks them all; SEARCH holds the
# overrides that point the run to it.
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

# start_shards FOLDER PORT: a server of FOLDER/part-I on each node; their addresses go to `shards` of the caller.
start_shards() {
  local node number=0 address
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    [ -d "$1/part-$number" ] || fail "RETRIEVAL_SHARDS: there is no $1/part-$number; build one part for each of the $SLURM_JOB_NUM_NODES nodes with tools/build_index.py --part I/$SLURM_JOB_NUM_NODES"
    [ ! -d "$1/part-$SLURM_JOB_NUM_NODES" ] || fail "RETRIEVAL_SHARDS: $1 has more parts than the $SLURM_JOB_NUM_NODES nodes, and all are needed"
    address="$(node_address "$node")"
    # Each its own port: on a machine that stands for several nodes they would collide.
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

# keep_serving NAME NODE OPTION ...: a retrieval server on NODE, started again when it dies, until this function is ended by
# TERM. A mistake in its options ends it; once it has served, what it calls one may be a part that is being started again.
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
    echo "slurm: $name on $node ended with $code; started again" >&2
    sleep 2
  done
}

stop_retrieval() {
  local pid
  for pid in ${RETRIEVAL_PIDS[@]+"${RETRIEVAL_PIDS[@]}"}; do kill "$pid" 2>/dev/null || true; done
  for pid in ${RETRIEVAL_PIDS[@]+"${RETRIEVAL_PIDS[@]}"}; do wait "$pid" 2>/dev/null || true; done
}

node_address() { scontrol show node "$1" --oneliner | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'; }

# await_health URL SECONDS NAME: until the server answers; the job ends if it has ended or takes longer.
await_health() {
  local url="$1" end=$((SECONDS + $2)) pid="${RETRIEVAL_PIDS[-1]}"
  if [[ "$3" == shard_* ]]; then pid="${RETRIEVAL_PIDS[${3#shard_}]}"; fi
  until curl --silent --fail --max-time 5 --output /dev/null "$url"; do
    kill -0 "$pid" 2>/dev/null || { echo "slurm: the retrieval server has ended; $LOGS/$3.log tells why:" >&2
                                    tail -n 3 "$LOGS/$3.log" >&2; stop_retrieval; exit 3; }
    [ "$SECONDS" -lt "$end" ] || { stop_retrieval; fail "$url did not answer within $2 s; see $LOGS/$3.log"; }
    sleep 1
  done
  echo "slurm: retrieval server at $url"
}

# train CONFIG [OVERRIDE ...], warm_start CONFIG [OVERRIDE ...]: dry run, or a program that requeues itself.
train() { go_on launch/train.py "$@"; }
warm_start() { go_on launch/warmstart.py "$@"; }

go_on() {
  local program="$1"; shift
  [ $# -ge 1 ] || fail "no configuration; sbatch slurm/NAME.sh [CONFIG] [section.field=value ...]"
  [ -f "$1" ] || fail "there is no configuration $1 in $PWD"
  if [ "${DRY_RUN:-}" = 1 ]; then
    # The layout is that of the whole job, whatever this allocation is.
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

# finish CODE: end with it, or put the job into the queue again.
finish() {
  IS_FINISHING=yes
  local bad="" excluded="" with="" state
  state="$(squeue --noheader --jobs="$JOB" --format=%T 2>/dev/null || true)"
  if [ "$1" != 0 ] && [ "$state" != RUNNING ]; then exit "$1"; fi  # cancelled: it stays so
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
  trap '' TERM  # the next command ends this script
  if [ -z "$excluded" ]; then
    scontrol requeue "$JOB"
  else
    # Slurm changes the excluded nodes of a waiting job only.
    scontrol requeuehold "$JOB"
    for _ in 1 2 3 4 5 6 7 8 9 10; do
      scontrol update "JobId=$JOB" "ExcNodeList=$excluded" 2>/dev/null && break
      sleep 1
    done
    scontrol release "$JOB"
  fi
  exit "$1"
}

# The furthest step that rank 0 has reported since this start of the job; 0: none.
furthest_step() {
  { echo 0; tail -c "+$FIRST_BYTE" "$LOGS/rank_0.log" | grep -oE 'step [0-9]+(/| of )' || true; } | grep -oE '[0-9]+' | sort -n | tail -n 1
}

# exclusion BAD: the nodes to exclude from now on, comma-separated: BAD and those that the job excludes already.
# Empty if the job requires one of them by name, or the partition then has too few nodes that are up: Slurm would call that a
# bad constraint and never start the job.
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

# The job's nodes, comma-separated, that are down, cannot start a process, or whose GPU driver does not answer.
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
