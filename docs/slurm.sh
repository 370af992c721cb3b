#!/bin/bash
# A run on several nodes under Slurm: one launcher a node, requeued until it is complete.
#
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 slurm.sh PRESET --data.path DATA --out OUT ...
#
# DATA and OUT are folders that all nodes see. What training reads from the environment (NCCL_SOCKET_IFNAME,
# GLOO_SOCKET_IFNAME, ACCELERATE_USE_CPU=true, ...) is taken from where sbatch is called. PROCESSES is the number of
# processes a node: by default one for each GPU.
#SBATCH --job-name=styleloom
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=styleloom-%j.txt
#SBATCH --signal=B:TERM@120
set -u
grace=${GRACE:-90}        # seconds for saving; more than --parallel.grace-s of the run
restarts=${RESTARTS:-100} # after so many, a run that fails is not started again

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN PORT=$((20000 + SLURM_JOB_ID % 10000)) GRACE=$grace

# shellcheck disable=SC2016  # the variables are those of each node
srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
    --nproc-per-node "${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}" --master-addr "$MAIN" --master-port "$PORT" \
    --shutdown-timeout "$GRACE" -m styleloom.scripts.train "$@"' torchrun "$@" &

state() { squeue --noheader --jobs "$SLURM_JOB_ID" --format %T; }

# 120 s before the time limit, and where preemption leaves a grace, this shell is told to stop, and tells the launchers.
# If Slurm is ending the job, it has told them itself, and the job's state is no longer RUNNING.
stopped=0
stop() {
    if [ $stopped = 0 ] && [ "$(state)" = RUNNING ]; then scancel --signal=TERM "$SLURM_JOB_ID"; fi
    stopped=1
}
trap stop TERM
while :; do
    wait $!
    status=$?
    kill -0 $! 2>/dev/null || break # otherwise it was the signal that ended `wait`
done
if [ "$status" = 0 ]; then exit 0; fi

echo "slurm.sh: srun ended with $status, told to stop: $stopped, restarts so far: ${SLURM_RESTART_COUNT:-0}"
if [ "$(state)" = RUNNING ] && { [ $stopped = 1 ] || [ "${SLURM_RESTART_COUNT:-0}" -lt "$restarts" ]; }; then
    trap - TERM
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # until Slurm ends this shell
fi
exit "$status"
