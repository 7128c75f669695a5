#!/usr/bin/env bash
# The batch script of launch/slurm.sh, given PYTHON and the arguments of simgr_jax.train. sbatch and srun hand these on
# as they are.
set -euo pipefail

# srun has not taken this from sbatch since SLURM 22.05.
step=(srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})

# SLURM sends USR1 shortly before the time is up.
requeued=''
trap 'requeued=yes; scontrol requeue "$SLURM_JOB_ID" || true' USR1

"${step[@]}" "$1" -m simgr_jax.train "${@:2}" &
code=0
wait $! || code=$?
# The signal ends the wait, not the training: SLURM does that when it takes the job back.
if [[ $requeued ]]; then
  code=0
  wait $! || code=$?
fi
exit "$code"
