#!/usr/bin/env bash
# Trains on a Cloud TPU VM, of one host or many.
#
#     launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [options] [-- arguments of simgr_jax.train]
#
#     up       all of it: queue, setup, run; queues and sets up anew after a preemption until the run has ended.
#              Given again, it takes up again what it finds. Exits 0, or 2 if the run ended with a user's mistake
#     queue    requests the TPU; it is there when status says ACTIVE and READY
#     create   makes the TPU at once, or fails if there is none
#     setup    copies the checkout (what git tracks, and new files) to all workers, and installs what it needs
#     run      begins training on all workers, where it goes on without this terminal
#     logs     follows the log of worker 0
#     status   of the request, the TPU, and the run on each worker
#     stop     ends the run on all workers; the TPU stays, and costs
#     delete   deletes the TPU and its request
#
#     --name=NAME        of the TPU
#     --zone=ZONE        as us-west4-a
#     --project=PROJECT  gcloud's, unless given
#     --type=TYPE        as v5litepod-16, v5p-8, v6e-16 (create, queue, up)
#     --version=VERSION  the runtime; the one for the type, unless given (create, queue, up)
#     --spot             cheap, and preempted at any time (create, queue, up)
#     --extra=FLAG       a flag of gcloud's, like --extra=--reserved; may be repeated (create, queue, up)
#     --bucket=BUCKET    is mounted as /mnt/bucket on all workers (setup, up)
#     --worker=N         whose log; 0, unless given (logs)
#     --poll=SECONDS     between two looks; 60, unless given (up)
#     --max_failures=N   crashes of one TPU's run before giving up; 3, unless given; preemptions don't count (up)
#     --delete           deletes the TPU when the run has ended, however it did (up)
#     --dry_run          prints the commands instead
#
# docs/launch.md tells more.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

name='' zone='' project='' type='' version='' bucket='' worker=0 poll=60 max_failures=3 delete_after=0
create_flags=()
train=()

parse() {
  while (($#)); do
    case $1 in
      --help) usage && exit ;;
      --name=*) name=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --type=*) type=${1#*=} ;;
      --version=*) version=${1#*=} ;;
      --spot) create_flags+=(--spot) ;;
      --extra=*) create_flags+=("${1#*=}") ;;
      --bucket=*) bucket=${1#*=} ;;
      --worker=*) worker=${1#*=} ;;
      --poll=*) poll=${1#*=} ;;
      --max_failures=*) max_failures=${1#*=} ;;
      --delete) delete_after=1 ;;
      --dry_run) dry_run=1 ;;
      --) shift && train=("$@") && break ;;
      *) die "$1: is no option; see launch/tpu_vm.sh --help" ;;
    esac
    shift
  done
}

# https://cloud.google.com/tpu/docs/runtimes
version_of_type() {
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    tpu7x-*) die "--type=$type: is to be had on GKE alone; use launch/xpk.sh" ;;
    *) die "--version: is not known for --type=$type; give --version=..." ;;
  esac
}

# tpus GROUP VERB ...: every call of gcloud, with the place.
tpus() {
  call gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"}
}

create() {
  tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" "${create_flags[@]}"
}

queue() {
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
    "${create_flags[@]}"
}

# on WORKER LINE: runs a line of bash there. It passes gcloud and ssh as it is.
on() {
  tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}

# worker_script WORKER WORD...: runs tpu_worker.sh there; the words arrive as they are, whatever is in them.
worker_script() {
  on "$1" "bash simgr_jax/launch/tpu_worker.sh $(quote "${@:2}")"
}

setup() {
  local archive=${TMPDIR:-/tmp}/simgr_jax-$name.tar.gz
  pack "$archive" &&
    tpus tpu-vm scp "$archive" "$name:simgr_jax.tar.gz" --worker=all &&
    on all "rm -rf simgr_jax.new && mkdir simgr_jax.new && tar -xzf simgr_jax.tar.gz -C simgr_jax.new &&\
 bash simgr_jax.new/launch/tpu_worker.sh setup${bucket:+ $(quote "$bucket")}"
}

# pack FILE: the checkout as it is, without what git ignores or the user deleted.
pack() {
  local list=(git -C "$root" ls-files -z --cached --others --exclude-standard)
  local tar=(tar --create --gzip --file="$1" --directory="$root" --null --files-from=-)
  if ((dry_run)); then
    echo "$(show "${list[@]}") | $(show "${tar[@]}")"
    return
  fi
  git -C "$root" rev-parse --git-dir >/dev/null 2>&1 || die "$root: is no git checkout; setup copies what git tracks"
  "${list[@]}" |
    while IFS= read -r -d '' file; do [[ ! -e $root/$file ]] || printf '%s\0' "$file"; done |
    "${tar[@]}"
}

run() { worker_script all run "${train[@]}"; }

logs() { worker_script "$worker" logs; }

stop() { worker_script all stop; }

status() {
  request_state
  tpu_state
  run_status
}

# The request's state, as ACTIVE; nothing if there is no request, and a failure if gcloud can't tell.
request_state() {
  tpus queued-resources list --filter="name~/queuedResources/$name\$" --format='value(state.state)'
}

tpu_state() { tpus tpu-vm describe "$name" --format='value(state)'; }

# A line of each worker, of the run with these arguments if there are some: see status in tpu_worker.sh.
run_status() {
  on all "if [ -e simgr_jax ]; then bash simgr_jax/launch/tpu_worker.sh status $(quote "${train[@]}");\
 else echo simgr_jax: none; fi"
}

delete() {
  if ((dry_run)); then
    echo '# If it was queued:'
    tpus queued-resources delete "$name" --force --quiet
    echo '# If it was created:'
    tpus tpu-vm delete "$name" --quiet
    return
  fi
  local state
  state=$(request_state) || return
  if [[ $state ]]; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

say() { echo "$(date +%H:%M:%S) $name: $*" >&2; }

# All that up knows of what was before is how often it failed, so it can be ended and begun again at any time.
up() {
  if ((dry_run)); then
    echo "# Every $poll s until the run has ended, what is missing of:"
    request_state && queue && setup && run && run_status
    if ((delete_after)); then delete; fi
    return
  fi
  answered=0 failures=0 ended=''
  while step && [[ ! $ended ]]; do sleep "$poll"; done
  if ! ((delete_after)) || ! delete; then
    say "is still there, and costs; delete it: launch/tpu_vm.sh delete --name=$name --zone=$zone"
  fi
  exit "$ended"
}

# Looks what there is, and does the next thing. Sets `ended` to up's exit code when there is nothing more to do.
step() {
  local state
  if ! state=$(request_state); then
    ((answered)) || exit 1 # A wrong zone, or no login: gcloud has said it.
    say "gcloud does not answer"
    return
  fi
  case $state in
    '')
      say "queueing"
      failures=0
      queue || ((answered)) || exit 1
      ;;
    ACTIVE) step_of_run ;;
    SUSPENDED) preempted ;;
    FAILED)
      say "the request failed; gcloud compute tpus queued-resources describe $name says why"
      ended=1
      ;;
    *) say "$state" ;;
  esac
  answered=1
}

preempted() {
  say "preempted"
  delete || say "could not be deleted yet"
}

step_of_run() {
  local lines state
  if ! lines=$(run_status 2>/dev/null); then
    # Workers that don't answer may be in maintenance, or behind a broken network: they come back.
    state=$(tpu_state) || state=unknown
    case $state in
      PREEMPTED | TERMINATED | STOPPED) preempted ;;
      *) say "the workers don't answer; the TPU is $state" ;;
    esac
    return
  fi
  case $lines in
    *'simgr_jax: other '*)
      say "another run goes on there; stop it first"
      ended=2
      ;;
    *'simgr_jax: ended 2 '*)
      say "ended with a user's mistake"
      worker_script all end || true
      stop || true
      ended=2
      ;;
    *'simgr_jax: ended stopped '*)
      say "was stopped"
      ended=1
      ;;
    *'simgr_jax: ended '[!0]* | *'simgr_jax: lost '*)
      worker_script all end || true
      failed "crashed"
      ;;
    *'simgr_jax: none'*) begin ;;
    *'simgr_jax: running '*) say "running" ;;
    *'simgr_jax: ended 0 '*)
      say "finished"
      ended=0
      ;;
    *) say "the workers say nothing" ;;
  esac
}

# One process that dies takes the others with it, sooner or later: so all begin again, from the latest checkpoint.
begin() {
  say "setting up"
  if on all "[ ! -e simgr_jax ] || bash simgr_jax/launch/tpu_worker.sh reset" && setup && run; then
    say "running"
  else
    failed "could not begin"
  fi
}

failed() {
  failures=$((failures + 1))
  say "$1 ($failures)"
  if ((failures > max_failures)); then
    ended=1
  elif [[ $1 == crashed ]]; then
    begin
  fi
}

main() {
  [[ ${1:-} != --help ]] || { usage && exit; }
  local command=${1:-}
  case $command in
    up | queue | create | setup | run | logs | status | stop | delete) ;;
    '') die "COMMAND: is missing; see launch/tpu_vm.sh --help" ;;
    *) die "$command: is no command; see launch/tpu_vm.sh --help" ;;
  esac
  parse "${@:2}"
  need_name name "$name"
  need_option zone "$zone"
  [[ $bucket =~ ^[-_.a-z0-9]*$ ]] || die "--bucket=$bucket: is no bucket; give its name alone, without gs://"
  [[ $worker =~ ^([0-9]+|all)$ ]] || die "--worker=$worker: is no worker; give its number, or all"
  need_number poll "$poll"
  need_number max_failures "$max_failures"
  case $command in
    up | queue | create)
      need_option type "$type"
      [[ $version ]] || version=$(version_of_type)
      ;;
  esac
  case $command in
    up | run) need_train_arguments "${train[@]}" ;;
    *) ((${#train[@]} == 0)) || die "--: $command takes no arguments of simgr_jax.train; run and up do" ;;
  esac
  need_tool gcloud https://cloud.google.com/sdk/docs/install
  "$command"
}

main "$@"
