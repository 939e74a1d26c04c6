#!/usr/bin/env bash
#SBATCH --job-name=ds_seg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@180
#SBATCH --requeue
# Train under Slurm, one task a GPU:
#
#   sbatch --nodes 2 launch/slurm.sh RUN [ds-seg train options]
#
# A run that is stopped saves first and ends with 75; `--resume auto`, which the script adds, makes the requeued job go on
# with it. The signal comes 180 s before the end of the job: give more (sbatch --signal=TERM@600), or --max-time 23:50 in a
# job of 24 hours, where a save takes longer.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
if [ $# -eq 0 ]; then
  echo "usage: sbatch launch/slurm.sh RUN [ds-seg train options]" >&2
  exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "launch/slurm.sh: this is no Slurm job: start it with  sbatch launch/slurm.sh $*" >&2
  exit 2
fi
for argument in "$@"; do
  case $argument in --resume | --resume=*)
    echo "launch/slurm.sh: leave out --resume: the script adds --resume auto, for jobs that are requeued. To go on from an" \
      "older checkpoint than the newest, move the newer ones out of the work dir's checkpoints/ first." >&2
    exit 2 ;;
  esac
done
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
code=0
# since Slurm 22.05 srun does not take --cpus-per-task from the job
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python -m ds_seg train "$@" --resume auto || code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID" || echo "launch/slurm.sh: the job could not be requeued: submit it again to go on" >&2
fi
exit "$code"
