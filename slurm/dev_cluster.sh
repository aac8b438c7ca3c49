#!/usr/bin/env bash
# Run a Slurm cluster on this machine, to try the jobs of this folder. Partition main has two nodes; partition spare has
# these two and a third node. Needs root.
#   slurm/dev_cluster.sh start|stop|status
# Files are in SLURM_DEV_DIR [/tmp/a2tgpo-slurm]. All daemons listen on 127.0.0.1. After start, run in every shell:
#   export SLURM_CONF=/tmp/a2tgpo-slurm/slurm.conf
set -euo pipefail

DIR="${SLURM_DEV_DIR:-/tmp/a2tgpo-slurm}"
export SLURM_CONF="$DIR/slurm.conf"
NODES=(n1 n2 n3)
fail() { echo "slurm/dev_cluster.sh: $*" >&2; exit 1; }

is_running() { [ -f "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

wait_for() {
  local what="$1"; shift
  for _ in $(seq 60); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.5
  done
  fail "$what after 30 s; see $DIR/log"
}

all_idle() { [ "$(sinfo --noheader --Node --format="%N %T" 2>/dev/null | sort -u | grep -cE " (idle|mixed|allocated)$")" = "${#NODES[@]}" ]; }

write_config() {
  local memory cores
  cores="$(getconf _NPROCESSORS_ONLN)"  # not nproc, which obeys OMP_NUM_THREADS
  memory="$(awk '/MemTotal/ {print int($2 / 1024 / 3)}' /proc/meminfo)"
  # All nodes share this machine's cores, so bind ranks to cores only if SLURM_CPU_BIND=cores is set.
  cat >"$SLURM_CONF" <<CONF
ClusterName=a2tgpo-dev
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/affinity
TaskPluginParam=None
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool-%n
SlurmctldPidFile=$DIR/ctld.pid
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/ctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
ReturnToService=2
KillWait=30
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n[1-3] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17001-17003] CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
PartitionName=spare Nodes=n[1-3] MaxTime=INFINITE State=UP OverSubscribe=YES
CONF
}

start() {
  [ "$(id -u)" = 0 ] || fail "needs root: Slurm's daemons start jobs as other users"
  for program in munged slurmctld slurmd; do
    command -v "$program" >/dev/null || fail "there is no $program here; apt-get install slurm-wlm munge"
  done
  if is_running "$DIR/ctld.pid"; then echo "already running: export SLURM_CONF=$SLURM_CONF"; return; fi
  mkdir -p "$DIR"/{state,log,munge} "${NODES[@]/#/$DIR/spool-}"
  chmod 755 "$DIR" "$DIR/munge"
  head -c 128 /dev/urandom >"$DIR/munge/key"; chmod 400 "$DIR/munge/key"; chmod 700 "$DIR/log"
  write_config
  munged --force --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" --pid-file="$DIR/munge/pid" \
    --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed" >"$DIR/log/munged.out" 2>&1 || fail "munged: $(tail -n 1 "$DIR/log/munged.out")"
  slurmctld -c -f "$SLURM_CONF" >"$DIR/log/ctld.out" 2>&1 || fail "slurmctld: $(tail -n 1 "$DIR/log/ctld.out")"
  for node in "${NODES[@]}"; do
    slurmd -c -N "$node" -f "$SLURM_CONF" >"$DIR/log/slurmd-$node.out" 2>&1 || fail "slurmd $node: $(tail -n 1 "$DIR/log/slurmd-$node.out")"
  done
  wait_for "the nodes are not ready" all_idle
  echo "the nodes are ready: export SLURM_CONF=$SLURM_CONF"
}

stop() {
  if is_running "$DIR/ctld.pid"; then scancel --user=root >/dev/null 2>&1 || true; fi
  for file in "$DIR"/slurmd-*.pid "$DIR/ctld.pid" "$DIR/munge/pid"; do
    if is_running "$file"; then
      kill "$(cat "$file")" 2>/dev/null || true
      for _ in $(seq 40); do is_running "$file" || break; sleep 0.25; done
    fi
  done
  rm -rf "$DIR"
  echo stopped
}

case "${1:-}" in
  start) start ;;
  stop) stop ;;
  status) is_running "$DIR/ctld.pid" || { echo "not running"; exit 1; }; sinfo; squeue ;;
  *) sed -n '4p' "$0" | cut -c5- >&2; exit 2 ;;
esac
