#!/usr/bin/env bash
# Train on this machine's GPUs, or on all hosts of a hostfile, with DeepSpeed's launcher.
#
#   launch/train.sh RUN [ds-seg train options]                     all GPUs of this machine, or CUDA_VISIBLE_DEVICES
#   NUM_GPUS=2 launch/train.sh RUN ...                              so many of them (CPU processes where there is no GPU)
#   HOSTFILE=hosts launch/train.sh RUN ...                          several machines
#
# A hostfile has a line `hostname slots=8` for each machine. All need this folder and its .venv at the same
# path, the work dir on a shared file system, pdsh, and ssh from the first machine without a password.
# MASTER_PORT (default 29500) must be free on the first host.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
  sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
fi
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
[ -n "${HOSTFILE:-}" ] || exec python -m ds_seg.distributed.launching train "$@"

[ -f "$HOSTFILE" ] || { echo "launch/train.sh: hostfile '$HOSTFILE' does not exist" >&2; exit 2; }
launcher=(deepspeed --master_port "${MASTER_PORT:-29500}" --hostfile "$HOSTFILE")
[ -n "${NUM_GPUS:-}" ] && launcher+=(--num_accelerators "$NUM_GPUS")
exec "${launcher[@]}" --module ds_seg train "$@"
