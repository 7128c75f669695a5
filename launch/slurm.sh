#!/usr/bin/env bash
# Trains on a SLURM cluster, one process a GPU (or a node, without GPUs).
#
#     launch/slurm.sh [options] -- arguments of simgr_jax.train
#
# submits launch/slurm_job.sh. The job goes back to the queue when it is preempted, when a node fails and when its time
# is up, and goes on from its latest checkpoint when its turn comes again.
#
#     --name=NAME            of the job; simgr_jax, unless given
#     --nodes=N              1, unless given
#     --gpus_per_node=N      1, unless given; 0 for a cluster of CPUs
#     --time=TIME            as 4:00:00; the partition's, unless given
#     --partition=PARTITION  the cluster's, unless given
#     --python=FILE          an interpreter that all nodes see; .venv/bin/python of this checkout, unless given
#     --extra=FLAG           a flag of sbatch's, like --extra=--account=NAME; may be repeated
#     --dry_run              prints the command instead
#
# docs/launch.md tells more.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

name=simgr_jax nodes=1 gpus_per_node=1 python=$root/.venv/bin/python
logs=$root/workdirs/slurm
flags=()
train=()

parse() {
  while (($#)); do
    case $1 in
      --help) usage && exit ;;
      --name=*) name=${1#*=} ;;
      --nodes=*) nodes=${1#*=} ;;
      --gpus_per_node=*) gpus_per_node=${1#*=} ;;
      --time=* | --partition=*) flags+=("$1") ;;
      --python=*) python=${1#*=} ;;
      --extra=*) flags+=("${1#*=}") ;;
      --dry_run) dry_run=1 ;;
      --) shift && train=("$@") && break ;;
      *) die "$1: is no option; see launch/slurm.sh --help" ;;
    esac
    shift
  done
}

# JAX takes from SLURM that a process owns the GPU of its local number, so all tasks of a node must see all its GPUs:
# they are asked for by node, not by task.
submit() {
  if ((gpus_per_node > 0)); then
    flags=(--ntasks-per-node="$gpus_per_node" --gpus-per-node="$gpus_per_node" "${flags[@]}")
  else
    flags=(--ntasks-per-node=1 "${flags[@]}")
  fi
  call sbatch --parsable --job-name="$name" --nodes="$nodes" "${flags[@]}" \
    --requeue --signal=B:USR1@120 --open-mode=append --output="$logs/%j.log" --chdir="$root" \
    "$root/launch/slurm_job.sh" "$python" "${train[@]}"
}

main() {
  parse "$@"
  need_option name "$name"
  need_number nodes "$nodes"
  need_number gpus_per_node "$gpus_per_node"
  need_train_arguments "${train[@]}"
  need_tool sbatch https://slurm.schedmd.com/quickstart.html
  if ((dry_run)); then
    submit
    return
  fi
  [[ -x $python ]] || die "--python=$python: is no program; give an interpreter that has the requirements"
  mkdir -p "$logs" # sbatch does not, and without it there is no log
  local job
  job=$(submit)
  job=${job%%;*} # ;CLUSTER follows where there are several
  echo "job $job; its log: $logs/$job.log; to end it: scancel $job"
}

main "$@"
