#!/usr/bin/env bash
# Train on this machine's GPUs, or on all hosts of a hostfile, with DeepSpeed's launcher.
#
#   launch/train.sh RUN [ds-seg train options]                     all GPUs of this machine, or CUDA_VISIBLE_DEVICES
#   NUM_GPUS=2 launch/train.sh RUN ...                              two of them (or two CPU processes without GPUs)
#   HOSTFILE=hosts launch/train.sh RUN ...                          several machines
#
# Relative paths are those from the folder that holds launch/, wherever this is called.
# A hostfile has a line `hostname slots=8` for each machine. All need this folder and its .venv at the same
# path, the work dir on a shared file system, pdsh, and ssh from the first machine without a password.
# MASTER_PORT (default 29500) must be free on the first host. They get this shell's PATH, LD_LIBRARY_PATH,
# OMP_NUM_THREADS, *_ROOT, DS_*, HF_*, TORCH_*, WANDB_*, NCCL_* and PYTHON*, and what .deepspeed_env names.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
  sed -n '2,12p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
fi
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
[ -n "${HOSTFILE:-}" ] || exec python -m ds_seg.distributed.launching train "$@"

[ -f "$HOSTFILE" ] || {
  echo "launch/train.sh: hostfile '$HOSTFILE' does not exist; paths are those from $PWD" >&2
  exit 2
}
# what DeepSpeed answers with a traceback
hosts=$(grep -v '^[[:space:]]*#' "$HOSTFILE" | grep '[^[:space:]]' || :)
bad=$(grep -vE '^[[:space:]]*[^[:space:]]+[[:space:]]+slots=[0-9]' <<<"$hosts" || :)
twice=$(awk '{print $1}' <<<"$hosts" | sort | uniq -d)
if [ -n "${bad:-${twice:-}}" ] || [ -z "$hosts" ]; then
  echo "launch/train.sh: hostfile '$HOSTFILE' needs a line 'hostname slots=8' for each machine, once each; got" \
    "'$(head -n 1 <<<"${bad:-$twice}")'" >&2
  exit 2
fi
[ "$(grep -c '^[^#[:space:]]' "$HOSTFILE")" -lt 2 ] || command -v pdsh >/dev/null || {
  echo "launch/train.sh: DeepSpeed starts several machines with pdsh, which is not installed here: apt install pdsh" >&2
  exit 2
}
launcher=(deepspeed --master_port "${MASTER_PORT:-29500}" --hostfile "$HOSTFILE")
[ -n "${NUM_GPUS:-}" ] && launcher+=(--num_accelerators "$NUM_GPUS")

# DeepSpeed hands on what a file names, in double quotes where there is more than letters; a user's own comes last.
environment=$(mktemp)
for name in $(compgen -e); do
  case $name in PATH | LD_LIBRARY_PATH | OMP_NUM_THREADS | *_ROOT | DS_* | HF_* | TORCH_* | WANDB_*)
    printf '%s=%s\n' "$name" "$(printf %s "${!name}" | sed 's/[\\"$`]/\\&/g' | tr '\n' ' ')" ;;
  esac
done >"$environment"
own=${DS_ENV_FILE:-.deepspeed_env}
for file in "${HOME:-}/$own" "$own"; do
  if [ -f "$file" ]; then cat "$file" >>"$environment"; fi
done
exec 9<"$environment"
rm "$environment" # it may hold keys; the open file is enough
export DS_ENV_FILE=/proc/self/fd/9
exec "${launcher[@]}" --module ds_seg train "$@"
