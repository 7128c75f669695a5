#!/usr/bin/env bash
# The batch script of launch/slurm.sh. Its arguments are PYTHON and the arguments of simgr_jax.train, which sbatch and
# srun pass on unchanged.
set -euo pipefail

# Since SLURM 22.05, srun does not inherit this from sbatch.
step=(srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})

# SLURM sends USR1 shortly before the time limit.
requeued=''
trap 'requeued=yes; scontrol requeue "$SLURM_JOB_ID" || true' USR1

"${step[@]}" "$1" -m simgr_jax.train "${@:2}" &
code=0
wait $! || code=$?
# The signal ends only the wait. SLURM ends the training when it requeues the job.
if [[ $requeued ]]; then
  code=0
  wait $! || code=$?
fi
exit "$code"
