#!/usr/bin/env bash
# Trains with several processes on this machine's CPU, connected over loopback, to try out a run on several hosts.
# With GPUs, one process would use all of them, so leave JAX_PLATFORMS unset or set it to cpu.
#
#     launch/local.sh N [options] [--] arguments of simgr_jax.train
#
#     N              the number of processes
#     --binary=NAME  runs simgr_jax.NAME instead of train: evaluate or recommend
#     --dry_run      prints the commands instead of running them
#
# Only process 0 writes to the terminal. If a process fails, all are ended, and its exit code is returned. All are also
# ended when this script is. Training saves a checkpoint first.
# Environment: PYTHON is the interpreter (default python), JAX_PLATFORMS the platform for JAX (default cpu).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

binary=train
pids=()
# The seconds in which a process that is told to end must do so.
patience=15

# Picks a port below the range that the system assigns itself.
free_port() {
  local port=0
  until ((port)) && ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    port=$((20000 + RANDOM % 10000))
  done
  echo "$port"
}

# Ends the processes that are left: training needs a moment to save a checkpoint.
stop() {
  local tenths
  trap '' INT TERM
  kill "${pids[@]}" 2>/dev/null || true
  for ((tenths = 0; tenths < 10 * patience; tenths++)); do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
  wait
  rm -rf "$logs"
}

# fail CODE NUMBER: process NUMBER ended with CODE, so end all.
fail() {
  local code=$1 number=$2
  # Most mistakes hit all processes: then process 0 reports the mistake and ends as well.
  sleep 1
  if kill -0 "${pids[0]}" 2>/dev/null && ((number)); then
    echo "process $number ended with exit code $code:" >&2
    tail -n 30 "$logs/$number" >&2
  fi
  stop
  exit "$code"
}

main() {
  [[ ${1:-} != --help ]] || { usage && exit; }
  local number=${1:-} ended code address i
  [[ $number =~ ^[1-9][0-9]*$ ]] || die "N: is missing or not a number; give the number of processes first"
  shift
  while (($#)); do
    case $1 in
      --binary=*) binary=${1#*=} ;;
      --dry_run) dry_run=1 ;;
      --) shift && break ;;
      *) break ;;
    esac
    shift
  done
  [[ $binary =~ ^(train|evaluate|recommend)$ ]] || die "--binary=$binary: is unknown; give train, evaluate or recommend"
  [[ $binary != train ]] || need_train_arguments "$@"

  address=127.0.0.1:$(free_port)
  local command=(env "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}" "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}"
    "${PYTHON:-python}" -m "simgr_jax.$binary" "$@" "--coordinator=$address" "--num_processes=$number")
  # Linux then ends the processes also if this script is killed.
  ! command -v setpriv >/dev/null || command=(setpriv --pdeathsig=TERM "${command[@]}")
  if ((dry_run)); then
    for ((i = 0; i < number; i++)); do echo "$(show "${command[@]}" "--process_id=$i") &"; done
    echo wait
    exit
  fi

  logs=$(mktemp -d)
  trap 'stop; exit 130' INT
  trap 'stop; exit 143' TERM
  "${command[@]}" --process_id=0 &
  pids=($!)
  for ((i = 1; i < number; i++)); do
    "${command[@]}" "--process_id=$i" >"$logs/$i" 2>&1 &
    pids+=($!)
  done
  for ((i = 0; i < number; i++)); do
    code=0
    wait -n -p ended || code=$?
    ((!code)) || fail "$code" "$(index_of "$ended")"
  done
  rm -rf "$logs"
}

index_of() {
  local i
  for i in "${!pids[@]}"; do [[ ${pids[i]} != "$1" ]] || echo "$i"; done
}

main "$@"
