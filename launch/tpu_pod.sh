#!/bin/bash
# Creates a TPU pod slice, installs save_jax on its hosts, trains on all of them, deletes the slice.
#
#   launch/tpu_pod.sh [FLAGS] ACTION [-- FLAGS OF save_jax.main]
#
#   launch/tpu_pod.sh --name=save --zone=us-west4-a --accelerator=v5litepod-16 --spot all -- \
#       --config=configs/msrvtt.py --workdir=gs://BUCKET/run --config.data.dir=gs://BUCKET/prepared
#
# Actions
#   create, setup, run, delete   one step
#   all                          create, setup and run. A preempted slice is deleted and created
#                                again, and the same command resumes from its last checkpoint. The
#                                slice is deleted at the end, whatever happens
# Flags
#   --name=NAME --zone=ZONE --accelerator=TYPE   the slice: v5litepod-16, v6e-8, v4-32, v5p-8, ...
#   --project=ID            default: gcloud's current project
#   --version=RUNTIME       default: chosen by the accelerator
#   --spot                  use spot capacity
#   --queued                wait for capacity, as a queued resource
#   --data_disk=DISK        a persistent disk, for a slice of one host, mounted at /mnt/data
#   --max_restarts=N        restarts by `all`, default 50
#   --poll=SECONDS          time between checks of a slice that is not ready, default 30
#   --dry_run               print every command, run none
#
# The workdir must outlive the slice: gs://..., or /mnt/data/... with --data_disk.
# Exit codes are those of save_jax.main: 0 done; 2 a mistake in what you gave; 75 interrupted: run
# the same command again; 1 a fault of the program, training that broke down, or not finished after
# --max_restarts.

set -euo pipefail

name='' zone='' accelerator='' project='' version='' data_disk=''
spot=false queued=false dry_run=false
max_restarts=50 poll=30
action='' arguments=()

usage_error() {
  echo "error: $*" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --name=* | --zone=* | --accelerator=* | --project=* | --version=* | --data_disk=* | \
      --max_restarts=* | --poll=*)
      key=${1%%=*}
      printf -v "${key#--}" '%s' "${1#*=}"
      ;;
    --spot | --queued | --dry_run) printf -v "${1#--}" true ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    create | setup | run | delete | all)
      [[ -z $action ]] || usage_error "two actions, $action and $1: expected one"
      action=$1
      ;;
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) usage_error "unknown argument $1: expected a flag or an action that --help lists" ;;
  esac
  shift
done

[[ -n $action ]] || usage_error "expected an action: create, setup, run, delete or all"
for key in name zone accelerator; do
  [[ -n ${!key} ]] || usage_error "--$key is required"
done
for key in max_restarts poll; do
  [[ ${!key} =~ ^[0-9]+$ ]] || usage_error "--$key=${!key}: expected a whole number"
done
if [[ -n $data_disk && -z $project ]]; then usage_error "--data_disk needs --project"; fi
if [[ $action == run || $action == all ]]; then
  ((${#arguments[@]})) || usage_error "expected the flags of save_jax.main after --"
  workdir=''
  for argument in "${arguments[@]}"; do
    if [[ $argument == --workdir=* ]]; then workdir=${argument#*=}; fi
  done
  if [[ $workdir != gs://* && ! (-n $data_disk && $workdir == /mnt/data/*) ]]; then
    usage_error "--workdir=$workdir would be lost with the slice: expected gs://BUCKET/..., or" \
      "/mnt/data/... with --data_disk"
  fi
fi
if [[ -z $version ]]; then
  case $accelerator in
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) usage_error "--accelerator=$accelerator: no known runtime, give --version=RUNTIME" ;;
  esac
fi

where=(--zone="$zone")
if [[ -n $project ]]; then where+=(--project="$project"); fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
sources=(setup.py pyproject.toml README.md LICENSE save_jax configs data_pipelines launch)
# Ends the connection to a host that was preempted.
alive=(-o ServerAliveInterval=15 -o ServerAliveCountMax=4)

show() {
  printf '%q ' "$@"
  echo
}
do_it() {
  show "$@"
  if ! $dry_run; then "$@"; fi
}
tpu() { do_it gcloud compute tpus "$@" "${where[@]}"; }
on_all() { # runs a command on every host
  do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1" \
    -- "${alive[@]}"
}

state() { # prints the state of the slice; ABSENT if there is none
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' \
    2>/dev/null || echo ABSENT
}
queue_state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || echo ABSENT
}

create() {
  local now capacity=()
  if $spot; then capacity+=(--spot); fi
  if [[ -n $data_disk ]]; then
    capacity+=(--data-disk="source=projects/$project/zones/$zone/disks/$data_disk,mode=read-write")
  fi
  if ! $queued; then
    tpu tpu-vm create "$name" --accelerator-type="$accelerator" --version="$version" \
      ${capacity[@]+"${capacity[@]}"}
    return
  fi
  tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$accelerator" \
    --runtime-version="$version" ${capacity[@]+"${capacity[@]}"} || return
  if $dry_run; then
    show gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      "--format=value(state.state)"
    return
  fi
  while true; do
    now=$(queue_state)
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | ABSENT) break ;;
    esac
    echo "queued: $now"
    sleep "$poll"
  done
  echo "the queued resource is $now"
  return 1
}

setup() {
  local archive=/tmp/save_jax.tgz
  if ! $dry_run; then archive=$(mktemp "${TMPDIR:-/tmp}/save_jax.XXXXXX"); fi
  do_it tar --create --gzip --exclude=__pycache__ --file="$archive" "${sources[@]}" || return
  tpu tpu-vm scp "$archive" "$name:save_jax.tgz" --worker=all || return
  if ! $dry_run; then rm "$archive"; fi
  # The hosts' own Python is 3.10, which is too old.
  on_all 'set -e
rm -rf save_jax && mkdir save_jax && tar -xzf save_jax.tgz -C save_jax && cd save_jax
python=python3
if ! python3 -c "import sys; sys.exit(sys.version_info < (3, 11))"; then
  python=python3.11
  python3.11 -c "import ensurepip" 2>/dev/null || {
    sudo apt-get -o DPkg::Lock::Timeout=300 update -qq
    sudo apt-get -o DPkg::Lock::Timeout=300 install -y -qq python3.11-venv
  }
fi
$python -m venv ~/venv
~/venv/bin/pip install --quiet ".[data,tpu]" fsspec gcsfs' || return
  if [[ -n $data_disk ]]; then
    on_all 'set -e
sudo mkdir -p /mnt/data
mountpoint -q /mnt/data || sudo mount -o discard,defaults /dev/sdb /mnt/data
sudo chmod a+w /mnt/data'
  fi
}

run() {
  # A process left by an earlier connection would keep the chips: it is stopped first.
  on_all "cd save_jax
if [ -f ~/run.pid ] && kill -TERM \$(cat ~/run.pid) 2>/dev/null; then
  while kill -0 \$(cat ~/run.pid) 2>/dev/null; do sleep 1; done
fi
~/venv/bin/python -m save_jax.main --distributed$(printf ' %q' "${arguments[@]}") &
echo \$! > ~/run.pid
wait \$!"
}

delete() {
  if $queued; then
    tpu queued-resources delete "$name" --force --quiet
  else
    tpu tpu-vm delete "$name" --quiet
  fi
}

delete_if_there() {
  if $dry_run; then return; fi
  if [[ $(state) != ABSENT ]] || { $queued && [[ $(queue_state) != ABSENT ]]; }; then
    delete
  fi
}

all() {
  local code now set_up=false broken=0
  # The slice costs money: it is deleted, whatever ends this script.
  trap 'delete || echo "error: $name was not deleted: delete it, since it costs money" >&2' EXIT
  trap 'exit 75' INT TERM
  for ((restart = 0; restart <= max_restarts; restart++)); do
    if ((restart)); then
      echo "restart $restart of at most $max_restarts"
      sleep "$poll"
    fi
    # set -e has no effect in functions before ||: they return their errors themselves.
    if $dry_run || [[ $(state) != READY ]]; then
      set_up=false
      delete_if_there || continue
      create || continue
    fi
    if ! $set_up; then
      setup || continue
      set_up=true
    fi
    code=0
    run || code=$?
    if $dry_run; then
      show gcloud compute tpus tpu-vm describe "$name" "${where[@]}" "--format=value(state)"
      return
    fi
    case $code in
      0 | 2) exit "$code" ;;
    esac
    now=$(state)
    echo "the run ended with exit code $code, the slice is $now"
    # 1 is a fault of the run itself: hosts that lose another end with 75. It is tried once more, as
    # a host that is being preempted may break down first; but not twice in a row on a READY slice.
    if [[ $now == READY && $code == 1 ]]; then broken=$((broken + 1)); else broken=0; fi
    if ((broken == 2)); then exit 1; fi
  done
  echo "error: not finished after --max_restarts=$max_restarts: run the same command again" >&2
  exit 1
}

"$action"
