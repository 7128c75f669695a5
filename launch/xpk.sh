#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, through xpk; also on several slices.
#
#     launch/xpk.sh COMMAND [options] [-- arguments of simgr_jax.train]
#
#     build    makes the container image of this checkout, and pushes it
#     run      begins training; the cluster starts it again after a preemption or a crash
#     logs     follows the log of process 0
#     status   of the workload
#     delete   ends the workload, and deletes it; the cluster stays
#
#     --name=NAME          of the workload (all but build)
#     --cluster=CLUSTER    xpk's (run, status, delete)
#     --project=PROJECT    gcloud's, unless given
#     --zone=ZONE          gcloud's, unless given
#     --image=IMAGE        as us-docker.pkg.dev/PROJECT/REPOSITORY/simgr_jax:TAG (build, run)
#     --type=TYPE          as v5litepod-16 (run)
#     --num_slices=N       1, unless given (run)
#     --storage=STORAGE    one of xpk storage list, mounted in the containers; may be repeated (run)
#     --max_restarts=N     100, unless given (run)
#     --extra=FLAG         a flag of xpk's, like --extra=--priority=high; may be repeated (run)
#     --dry_run            prints the commands instead
#
# docs/launch.md tells more.
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
      *) die "$1: is no option; see launch/xpk.sh --help" ;;
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

# Exit codes above 126 (signals, as at a preemption) make xpk restart the workload, 1 (an exception: also what the other
# processes get when one is lost) by our wish, and 2 (a user's mistake) doesn't. exec, so that the signals reach Python.
run() {
  need_name name "$name"
  need_option cluster "$cluster"
  need_option image "$image"
  need_option type "$type"
  need_number num_slices "$num_slices"
  need_number max_restarts "$max_restarts"
  need_train_arguments "${train[@]}"
  workload create --workload="$name" --tpu-type="$type" --num-slices="$num_slices" --docker-image="$image" \
    --max-restarts="$max_restarts" --restart-on-exit-codes=1 "${create_flags[@]}" \
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
    *) die "$command: is no command; see launch/xpk.sh --help" ;;
  esac
  parse "${@:2}"
  [[ $command == run ]] || ((${#train[@]} == 0)) || die "--: $command takes no arguments of simgr_jax.train; run does"
  "$command"
}

main "$@"
