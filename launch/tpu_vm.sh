#!/usr/bin/env bash
# Trains on a Cloud TPU VM with one or more hosts.
#
#     launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [options] [-- arguments of simgr_jax.train]
#
#     up       does everything: queue, setup and run. After a preemption, queues and sets up again until the run ends.
#              If called again, continues from the state it finds. Exits 0, or 2 after a user's mistake in the run
#     queue    requests the TPU; it is available when status says ACTIVE and READY
#     create   creates the TPU immediately, or fails if none is available
#     setup    copies the checkout (tracked and new files) to all workers and installs the requirements
#     run      starts training on all workers; it does not need this terminal
#     logs     follows the log of worker 0
#     status   shows the state of the request, the TPU and the run on each worker
#     stop     ends the run on all workers; the TPU remains and costs money
#     delete   deletes the TPU and its request
#
#     --name=NAME        the TPU's name
#     --zone=ZONE        its zone, e.g. us-west4-a
#     --project=PROJECT  the project (default: gcloud's)
#     --type=TYPE        the TPU type, e.g. v5litepod-16, v5p-8 or v6e-16 (create, queue, up)
#     --version=VERSION  the runtime version (default: the one for the type) (create, queue, up)
#     --spot             uses cheaper capacity that can be preempted at any time (create, queue, up)
#     --extra=FLAG       a flag for gcloud, e.g. --extra=--reserved; may be repeated (create, queue, up)
#     --bucket=BUCKET    mounts this bucket as /mnt/bucket on all workers (setup, up)
#     --worker=N         the worker whose log is shown (default 0) (logs)
#     --poll=SECONDS     the time between two checks (default 60) (up)
#     --max_failures=N   crashes on one TPU before giving up (default 3); preemptions do not count (up)
#     --delete           deletes the TPU when the run has ended, successfully or not (up)
#     --dry_run          prints the commands instead of running them
#
# See docs/launch_tpu_vm.md for more.
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
      *) die "$1: is not an option; see launch/tpu_vm.sh --help" ;;
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
    tpu7x-*) die "--type=$type: is only available on GKE; use launch/xpk.sh" ;;
    *) die "--version: has no default for --type=$type; give --version=..." ;;
  esac
}

# tpus GROUP VERB ...: calls gcloud with the zone and project.
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

# on WORKER LINE: runs a line of bash on a worker. gcloud and ssh pass it on unchanged.
on() {
  tpus tpu-vm ssh "$name" --worker="$1" --command="$2"
}

# worker_script WORKER WORD...: runs tpu_worker.sh on a worker. Any words arrive unchanged.
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

# pack FILE: archives the working tree, without ignored or deleted files.
pack() {
  local list=(git -C "$root" ls-files -z --cached --others --exclude-standard)
  local tar=(tar --create --gzip --file="$1" --directory="$root" --null --files-from=-)
  if ((dry_run)); then
    echo "$(show "${list[@]}") | $(show "${tar[@]}")"
    return
  fi
  git -C "$root" rev-parse --git-dir >/dev/null 2>&1 || die "$root: is not a git checkout; clone the repository"
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

# Prints the request's state, e.g. ACTIVE, or nothing if there is no request. Fails if gcloud does.
request_state() {
  tpus queued-resources list --filter="name~/queuedResources/$name\$" --format='value(state.state)'
}

tpu_state() { tpus tpu-vm describe "$name" --format='value(state)'; }

# Prints one line per worker; with training arguments, about the run with these. See status in tpu_worker.sh.
run_status() {
  on all "if [ -e simgr_jax ]; then bash simgr_jax/launch/tpu_worker.sh status $(quote "${train[@]}");\
 else echo simgr_jax: none; fi"
}

delete() {
  if ((dry_run)); then
    echo '# If the TPU was queued:'
    tpus queued-resources delete "$name" --force --quiet
    echo '# If the TPU was created:'
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

# up keeps no state but its count of failures, so it can be ended and started again at any time.
up() {
  if ((dry_run)); then
    echo "# Every $poll s until the run has ended, whatever is still missing of:"
    request_state && queue && setup && run && run_status
    if ((delete_after)); then delete; fi
    return
  fi
  answered=0 failures=0 ended=''
  while step && [[ ! $ended ]]; do sleep "$poll"; done
  if ! ((delete_after)) || ! delete; then
    say "still exists and costs money; delete it: launch/tpu_vm.sh delete --name=$name --zone=$zone"
  fi
  exit "$ended"
}

# Checks the state and takes the next step. When nothing is left to do, sets `ended` to up's exit code.
step() {
  local state
  if ! state=$(request_state); then
    ((answered)) || exit 1 # E.g. a wrong zone or no login; gcloud has reported it.
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
      say "the request failed; see gcloud compute tpus queued-resources describe $name"
      ended=1
      ;;
    *) say "$state" ;;
  esac
  answered=1
}

preempted() {
  say "preempted"
  delete || say "cannot be deleted yet"
}

step_of_run() {
  local lines state
  if ! lines=$(run_status 2>/dev/null); then
    # Workers that do not answer may come back after maintenance or a network failure.
    state=$(tpu_state) || state=unknown
    case $state in
      PREEMPTED | TERMINATED | STOPPED) preempted ;;
      *) say "the workers don't answer; the TPU is $state" ;;
    esac
    return
  fi
  case $lines in
    *'simgr_jax: other '*)
      say "another run is active; stop it first"
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
    *'simgr_jax: ended 75 '*)
      say "stopped with its checkpoint saved"
      begin
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
    *) say "the workers report no state" ;;
  esac
}

# A process that dies sooner or later ends the others, so all start again from the latest checkpoint.
begin() {
  say "setting up"
  if on all "[ ! -e simgr_jax ] || bash simgr_jax/launch/tpu_worker.sh reset" && setup && run; then
    say "running"
  else
    failed "could not start"
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
    *) die "$command: is not a command; see launch/tpu_vm.sh --help" ;;
  esac
  parse "${@:2}"
  need_name name "$name"
  need_option zone "$zone"
  [[ $bucket =~ ^[-_.a-z0-9]*$ ]] || die "--bucket=$bucket: is not a bucket; give only its name, without gs://"
  [[ $worker =~ ^([0-9]+|all)$ ]] || die "--worker=$worker: is not a worker; give its number, or all"
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
    *) ((${#train[@]} == 0)) || die "--: $command takes no arguments; leave them out" ;;
  esac
  need_tool gcloud https://cloud.google.com/sdk/docs/install
  "$command"
}

main "$@"
