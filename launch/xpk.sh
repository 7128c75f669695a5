#!/usr/bin/env bash
# Trains on one or more TPU slices of a GKE cluster, through xpk.
#
#     launch/xpk.sh COMMAND [options] [-- arguments of simgr_jax.train]
#
#     build    makes the container image of this checkout and pushes it
#     run      starts training; the cluster restarts it after a preemption or a crash
#     logs     follows the log of process 0
#     status   shows the workload's state
#     delete   ends and deletes the workload; the cluster remains
#
#     --name=NAME          the workload's name (all but build)
#     --cluster=CLUSTER    the name of xpk's cluster (run, status, delete)
#     --project=PROJECT    the project (default: gcloud's)
#     --zone=ZONE          the zone (default: gcloud's)
#     --image=IMAGE        the image, e.g. us-docker.pkg.dev/PROJECT/REPOSITORY/simgr_jax:TAG (build, run)
#     --type=TYPE          the TPU type, e.g. v5litepod-16 (run)
#     --num_slices=N       the number of slices (default 1) (run)
#     --storage=STORAGE    mounts an entry of `xpk storage list` in the containers; may be repeated (run)
#     --max_restarts=N     the number of restarts before giving up (default 100) (run)
#     --extra=FLAG         a flag for xpk, e.g. --extra=--priority=high; may be repeated (run)
#     --dry_run            prints the commands instead of running them
#
# See docs/launch_clusters.md for more.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

name='' cluster='' image='' type='' num_slices=1 max_restarts=100
place=()
create_flags=()
train=()

parse() {
  while (($#)); do
    case $1 in
      --help) usage && exit ;;
      --name=*) name=${1#*=} ;;
      --cluster=*) cluster=${1#*=} ;;
      --project=* | --zone=*) place+=("$1") ;;
      --image=*) image=${1#*=} ;;
      --type=*) type=${1#*=} ;;
      --num_slices=*) num_slices=${1#*=} ;;
      --storage=*) create_flags+=("$1") ;;
      --max_restarts=*) max_restarts=${1#*=} ;;
      --extra=*) create_flags+=("${1#*=}") ;;
      --dry_run) dry_run=1 ;;
      --) shift && train=("$@") && break ;;
      *) die "$1: is not an option; see launch/xpk.sh --help" ;;
    esac
    shift
  done
}

build() {
  need_option image "$image"
  need_tool docker https://docs.docker.com/engine/install
  call docker build --platform=linux/amd64 --file="$root/launch/Dockerfile" --tag="$image" "$root"
  call docker push "$image"
}

# xpk restarts the workload after exit codes above 126 (signals, e.g. at a preemption). We also request a restart after
# 1 (an exception, or the loss of another process) and 75 (stopped by a signal, with its checkpoint saved), but not
# after 2 (a user's mistake). With exec, signals reach Python.
run() {
  need_name name "$name"
  need_option cluster "$cluster"
  need_option image "$image"
  need_option type "$type"
  need_number num_slices "$num_slices"
  need_number max_restarts "$max_restarts"
  need_train_arguments "${train[@]}"
  workload create --workload="$name" --tpu-type="$type" --num-slices="$num_slices" --docker-image="$image" \
    --max-restarts="$max_restarts" --restart-on-exit-codes=1,75 "${create_flags[@]}" \
    --command="exec python -m simgr_jax.train $(quote "${train[@]}")"
}

logs() {
  need_name name "$name"
  need_tool kubectl https://kubernetes.io/docs/tasks/tools
  local first=jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
  call kubectl logs --follow --tail=-1 --container=jax-tpu --selector="jobset.sigs.k8s.io/jobset-name=$name,$first"
}

status() {
  need_name name "$name"
  need_option cluster "$cluster"
  workload list --filter-by-job="^$name\$"
}

delete() {
  need_name name "$name"
  need_option cluster "$cluster"
  workload delete --workload="$name"
}

# workload VERB FLAGS...
workload() {
  need_tool xpk https://github.com/AI-Hypercomputer/xpk
  call xpk workload "$1" --cluster="$cluster" "${place[@]}" "${@:2}"
}

main() {
  [[ ${1:-} != --help ]] || { usage && exit; }
  local command=${1:-}
  case $command in
    build | run | logs | status | delete) ;;
    '') die "COMMAND: is missing; see launch/xpk.sh --help" ;;
    *) die "$command: is not a command; see launch/xpk.sh --help" ;;
  esac
  parse "${@:2}"
  [[ $command == run ]] || ((${#train[@]} == 0)) || die "--: $command takes no arguments; leave them out"
  "$command"
}

main "$@"
