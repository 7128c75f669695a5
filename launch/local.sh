#!/usr/bin/env bash
# Trains with several processes on this machine's CPU, which find each other over loopback: to try out what several
# hosts will do. On a machine with GPUs one process uses them all, so give JAX_PLATFORMS=cpu or nothing.
#
#     launch/local.sh N [options] [--] arguments of simgr_jax.train
#
#     N              how many processes
#     --binary=NAME  simgr_jax.NAME instead: evaluate, recommend
#     --dry_run      prints the commands instead
#
# Process 0 has the terminal. The first that fails ends all, and gives the exit code.
# PYTHON is the interpreter (python, unless set), JAX_PLATFORMS what JAX runs on (cpu, unless set).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

binary=train
pids=()

# Without the ports that the system gives out itself.
free_port() {
  local port=0
  until ((port)) && ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    port=$((20000 + RANDOM % 10000))
  done
  echo "$port"
}

stop() {
  local tenths
  trap '' INT TERM
  kill "${pids[@]}" 2>/dev/null || true
  for ((tenths = 0; tenths < 50; tenths++)); do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
  wait
  rm -rf "$logs"
}

# A process has ended with CODE: so does everything.
fail() {
  local code=$1 number=$2
  sleep 1 # Most mistakes are everybody's: then process 0 says it, and ends, too.
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
  [[ $number =~ ^[1-9][0-9]*$ ]] || die "N: is missing, or no number; give launch/local.sh the number of processes first"
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
  [[ $binary =~ ^(train|evaluate|recommend)$ ]] || die "--binary=$binary: is none; give train, evaluate or recommend"
  [[ $binary != train ]] || need_train_arguments "$@"

  address=127.0.0.1:$(free_port)
  local command=(env "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}" "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}"
    "${PYTHON:-python}" -m "simgr_jax.$binary" "$@" "--coordinator=$address" "--num_processes=$number")
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
