#!/usr/bin/env bash
# One training on N nodes of 8 GPUs that goes on by itself after preemption, a time limit or the loss of a node:
#
#     sbatch --nodes 4 docs/slurm.sh sit-xl-2-256 --data.path STORE --run-dir RUN
#
# Everything after the script's name goes to `lsep train`. Submit it from the environment that has lsep; STORE and RUN
# lie where all nodes see them. See docs/long-runs.md.
#SBATCH --job-name=lsep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lsep-%j.log
# Two minutes before the time limit this script gets SIGUSR1 (B: only it), and with it learns that it must requeue.
#SBATCH --signal=B:USR1@120
set -uo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-}"  # srun does not take it from sbatch
[[ -n $SRUN_CPUS_PER_TASK ]] || unset SRUN_CPUS_PER_TASK
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Seconds the workers have for their step and checkpoint; torch 2.11 does not read it and gives them 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100

asked='' step=''
trap 'asked=1; [[ -z $step ]] || kill -USR1 "$step"' USR1  # srun passes it on to its tasks

# No shell between srun and torchrun: SLURM signals the tasks themselves, not their children.
srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))" --rdzv-id "$SLURM_JOB_ID" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m lsep train "$@" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2> /dev/null; do  # a trap ends `wait` early
  wait "$step"
  status=$?
done

# torchrun exits with 1 after a signal, whatever its workers do. Preemption signals the steps, not this script.
if ((status)) && { [[ -n $asked ]] || scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
