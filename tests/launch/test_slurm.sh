#!/bin/bash
# Tests sweeps and the batch file on a real SLURM of one node, on the CPU, with the demo.
#
#   tests/launch/test_slurm.sh [--dry_run] [PREPARED_DEMO]
#
# Uses the SLURM that is running. As root on Debian or Ubuntu without one, installs slurm-wlm and
# starts it with its own configuration; it is stopped and removed at the end. Checks a sweep of two
# points; that it is not run again; that a point that is warned of its time limit is requeued and
# finishes; and the same for slurm.sbatch. Takes about half an hour on two cores.
# PYTHON chooses the interpreter. The demo is made in PREPARED_DEMO (default: demo_data) if absent.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

dry_run=false
if [[ "${1:-}" == --dry_run ]]; then
  dry_run=true
  shift
fi
data=$(realpath -m "${1:-demo_data}")
export PYTHON=${PYTHON:-python} JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2
PYTHON=$(command -v "$PYTHON")
work=$(mktemp -d "${TMPDIR:-/tmp}/save_jax_slurm.XXXXXX")
daemons=()

say() { echo "== $*"; }
fail() {
  echo "FAILED: $*" >&2
  exit 1
}
do_it() { # runs a command, or shows it
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

finish() {
  local code=$?
  if ((${#daemons[@]})); then
    scancel --user="$USER" 2>/dev/null || true
    for ((i = 0; i < 60; i++)); do # daemons that go first would leave the jobs behind
      if idle 2>/dev/null; then break; fi
      sleep 1
    done
    kill "${daemons[@]}" 2>/dev/null || true
    wait "${daemons[@]}" 2>/dev/null || true
  fi
  if ((code)) && ! $dry_run; then
    echo "logs are kept in $work" >&2
  else
    rm -rf "$work"
  fi
}
trap finish EXIT
export USER=${USER:-$(id -un)}

wait_for() { # wait_for SECONDS WHAT COMMAND...: until the command succeeds
  local seconds=$1 what=$2
  shift 2
  for ((i = 0; i < seconds; i++)); do
    if "$@" >/dev/null 2>&1; then return 0; fi
    sleep 1
  done
  squeue || true
  fail "no $what after $seconds s"
}

slurm_answers() { [[ -n "$(sinfo --noheader --states=idle,mixed,allocated --format=%n)" ]]; }

start_slurm() {
  if ! command -v slurmctld >/dev/null; then
    do_it apt-get update
    DEBIAN_FRONTEND=noninteractive do_it apt-get install --yes --no-install-recommends \
      slurm-wlm munge
  fi
  local memory
  memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
  cat >"$work/slurm.conf" <<CONF
ClusterName=save_jax_test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=30
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  mkdir -p "$work/state" "$work/spool"
  export SLURM_CONF=$work/slurm.conf
  if $dry_run; then
    cat "$work/slurm.conf"
  elif ! munge --no-input >/dev/null 2>&1; then
    install -d -o munge -g munge -m 755 /run/munge
    runuser -u munge -- munged --foreground &
    daemons+=($!)
    wait_for 30 munge munge --no-input
  fi
  for daemon in slurmctld slurmd; do
    if $dry_run; then
      echo "$daemon -D -f $work/slurm.conf"
    else
      "$daemon" -D -f "$work/slurm.conf" >"$work/$daemon.log" 2>&1 &
      daemons+=($!)
    fi
  done
  $dry_run || wait_for 60 "idle node" slurm_answers
}

complete() { # complete DIR N: so many runs below it are complete
  "$PYTHON" -m launch.report "$1" --csv="$work/report.csv" >"$work/report.txt" || return 1
  (($(grep -c ',complete$' "$work/report.csv") == $2))
}
began() { (($(grep -c '"loss"' "$1/metrics.jsonl") >= 2)); }
jobs() { squeue --me --name=save_jax --noheader --format=%i "$@"; }
idle() { [[ -z "$(jobs)" ]]; }
resumed() { grep -q "resuming from checkpoint" "$@"; } # what save_jax/resume.py prints

say "SLURM"
if $dry_run || ! slurm_answers 2>/dev/null; then
  ((EUID == 0)) || $dry_run || fail "no SLURM answers, and only root can start one here"
  start_slurm
fi
if ! $dry_run; then
  sinfo
  idle || fail "jobs called save_jax are in the queue already, and this test would touch them"
fi

cat >"$work/two_points.py" <<CONFIG
from configs import demo

get_config = demo.get_config


def sweep():
    yield {"optimizer.new": 3e-4}
    yield {"optimizer.new": 1e-3}
CONFIG
small=(--config.data.dir="$data" --config.batch_size=8)
sweep=("$PYTHON" -m launch.sweep --config="$work/two_points.py" --backend=slurm --time_hours=1)

say "a sweep of two points through submitit"
do_it "${sweep[@]}" --workdir="$work/sweep" --config.steps=5 "${small[@]}"
if ! $dry_run; then
  "${sweep[@]}" --workdir="$work/sweep" --config.steps=5 "${small[@]}" | tee "$work/again.txt"
  (($(grep -c "not again, it is job" "$work/again.txt") == 2)) || fail "it would run them twice"
  wait_for 1800 "end of the jobs" idle
  complete "$work/sweep" 2 || fail "not both points are complete: $(cat "$work/report.txt")"
  cat "$work/report.txt"
  say "started again, nothing is missing"
  "${sweep[@]}" --workdir="$work/sweep" --config.steps=5 "${small[@]}" | tee "$work/again.txt"
  grep -q "2 complete; 0 to run" "$work/again.txt" || fail "it would run again"
fi

say "a point that is warned of its time limit is requeued, and resumes from its checkpoint"
do_it "${sweep[@]}" --workdir="$work/requeue" --config.steps=30 --at_once=1 "${small[@]}"
if ! $dry_run; then
  wait_for 1200 "training of the first point" began "$work/requeue/optimizer.new-0.0003"
  scancel --signal=USR2 "$(jobs --states=running)"
  wait_for 1800 "end of the jobs" idle
  complete "$work/requeue" 2 || fail "not both points are complete: $(cat "$work/report.txt")"
  resumed "$work"/requeue/slurm/*_log.out || fail "no point resumed from a checkpoint"
fi

say "slurm.sbatch, interrupted once"
batch=(sbatch --gpus-per-node=0 --ntasks-per-node=1 --output="$work/sbatch.log"
  launch/slurm.sbatch --config=configs/demo.py --workdir="$work/sbatch"
  --config.steps=30 "${small[@]}")
do_it "${batch[@]}"
if ! $dry_run; then
  wait_for 1200 "training" began "$work/sbatch"
  scancel --signal=TERM "$(jobs --states=running)"
  wait_for 1800 "end of the job" idle
  complete "$work/sbatch" 1 || fail "the run is not complete: $(tail -5 "$work/sbatch.log")"
  resumed "$work/sbatch.log" || fail "it did not resume from a checkpoint"
fi
if ! $dry_run; then say "all passed"; fi
