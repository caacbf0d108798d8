#!/bin/bash
# Trains a recipe on several nodes under SLURM; submit it from the checkout, whose file system all nodes share:
#
#     sbatch docs/slurm.sh RECIPE [--stage STAGE] [--run FOLDER] [key.sub=value ...]
#
# 120 seconds before its time is up the job asks the trainer to save and stop, and where it did, with the status 143,
# queues itself again; the same command then resumes. A run that was finished by then, or that failed, ends the job with
# its own status. A job that SLURM preempts is queued again too (--requeue), and goes on from its last checkpoint.
# srun starts one process for each GPU, without a launcher between: torchrun would kill a trainer that takes more than 30
# seconds to save. Once one has ended, by a failure too, the others have 45 seconds to do the same.
# Set nodes, GPUs and time to what your cluster has; PYTHON, if it is not .venv/bin/python.
#SBATCH --job-name=kartina
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
if [ $# -eq 0 ]; then
  echo "slurm.sh: a recipe is missing; sbatch docs/slurm.sh shapes/dalle" >&2
  exit 2
fi

export PYTHON=${PYTHON:-.venv/bin/python}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
WORLD_SIZE=$SLURM_NTASKS
export MASTER_ADDR MASTER_PORT WORLD_SIZE

# SLURM signals this shell only (B:); srun passes on to its processes what it is sent.
asked= step=
trap 'asked=yes; kill -TERM $step' TERM

srun --kill-on-bad-exit=0 --wait=45 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec $PYTHON -m kartina.training "$@"' trainer "$@" &
step=$!
wait "$step"
while kill -0 "$step" 2> /dev/null; do # a signal ends `wait` before the step ends
  wait "$step"
done
wait "$step" # at once, with the status of the step itself
status=$?

if [ -n "$asked" ] && [ "$status" -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"; then
  exit 0
fi
exit "$status"
