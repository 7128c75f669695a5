#!/usr/bin/env bash
# Trains on a SLURM cluster, with one process per GPU (or per node, without GPUs).
#
#     launch/slurm.sh [options] -- arguments of simgr_jax.train
#
# submits launch/slurm_job.sh. The job returns to the queue when it is preempted, when a node fails and when its time is
# up. It then continues from its latest checkpoint when its turn comes again.
#
#     --name=NAME            the job's name (default simgr_jax)
#     --nodes=N              the number of nodes (default 1)
#     --gpus_per_node=N      GPUs per node (default 1; 0 for a cluster of CPUs)
#     --time=TIME            the time limit, e.g. 4:00:00 (default: the partition's)
#     --partition=PARTITION  the partition (default: the cluster's)
#     --python=FILE          an interpreter that all nodes see (default: this checkout's .venv/bin/python)
#     --extra=FLAG           a flag for sbatch, e.g. --extra=--account=NAME; may be repeated
#     --dry_run              prints the command instead of running it
#
# See docs/launch_clusters.md for more.
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
      *) die "$1: is not an option; see launch/slurm.sh --help" ;;
    esac
    shift
  done
}

# On SLURM, JAX gives each process the GPU with its local number. All tasks of a node must therefore see all its GPUs,
# so request GPUs per node, not per task.
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
  [[ -x $python ]] || die "--python=$python: is not a program; give an interpreter with the requirements installed"
  mkdir -p "$logs" # sbatch does not create the log's folder
  local job
  job=$(submit)
  job=${job%%;*} # sbatch appends ;CLUSTER if there are several
  echo "job $job; its log: $logs/$job.log; to end it: scancel $job"
}

main "$@"
