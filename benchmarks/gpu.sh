#!/usr/bin/env bash
# Everything that is to be measured on one GPU with 80 or 141 GB, without a network and in 20 minutes.
#
#   benchmarks/gpu.sh [OUT]                     all parts
#   benchmarks/gpu.sh PART... [OUT]             setup | tests | steps | batches | fit, each within 10 minutes
#
#   setup    versions, nvidia-smi, ds-seg doctor, rates of matrix products and copies, the offloaded optimizer's build
#   tests    the GPU-marked tests
#   steps    one step of the 6B model at 504 crops, full fine-tuning: ours and FSDP2, with and without compile
#   batches  the same with compile for 1 to 16 crops
#   fit      the run files for one GPU: 10 steps on one batch, the loss must fall; memory and time beside the plan
#
# OUT (gpu_figures) gets one JSON and one log a part; a part that fails or has no time left says so in its JSON, and the
# others go on. Blocks follow the GPU's memory: 48 from 130 GiB on; below, 36 resident, and 48 with a part of the
# optimizer in host memory.
#
#   WHEELS=folder    of benchmarks/collect_wheels.sh: installed beside PYTHON's own packages, into SITE. Without it: .venv,
#                    or the python3 at hand
#   DEVICE=cpu       a dry run at tiny size, in minutes
#   MEMORY_GIB=80    in place of what the GPU has
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
parts=() out=
for word in "$@"; do
  case $word in
    setup | tests | steps | batches | fit) parts+=("$word") ;;
    -*) echo "gpu.sh: no option $word; the head of $0 tells what there is" >&2; exit 2 ;;
    *) [ -z "$out" ] || { echo "gpu.sh: one folder for the figures, got $out and $word" >&2; exit 2; }; out=$word ;;
  esac
done
out=${out:-${OUT:-gpu_figures}}
declare -A budget_s=([setup]=120 [tests]=240 [steps]=300 [batches]=260 [fit]=280) # together 20 minutes
if [ ${#parts[@]} -gt 0 ]; then for part in "${!budget_s[@]}"; do budget_s[$part]=${PART_S:-540}; done; fi
[ ${#parts[@]} -gt 0 ] || parts=(setup tests steps batches fit)
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -n "${WHEELS:-}" ]; then WHEELS=$(cd "$WHEELS" && pwd) || exit 2; fi
cd "$root"
DEVICE=${DEVICE:-cuda}
export WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 DS_ACCELERATOR=$DEVICE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$([ "$DEVICE" = cpu ] && echo 1 || nproc)}

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -n "${WHEELS:-}" ] || [ ! -x .venv/bin/python ] || PYTHON=$root/.venv/bin/python
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [ -n "${WHEELS:-}" ]; then
  site=${SITE:-${TMPDIR:-/tmp}/ds_seg_site}
  if [ ! -f "$site/installed" ]; then
    rm -rf "$site"
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 2
    touch "$site/installed"
  fi
  export PYTHONPATH=$PYTHONPATH:$site PATH=$site/bin:$PATH
fi
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH # ninja, for operators that are compiled at run time
extensions=
[ -n "${TORCH_EXTENSIONS_DIR:-}" ] || export TORCH_EXTENSIONS_DIR=${extensions:=${TMPDIR:-/tmp}/ds_seg_extensions}

# What runs, by device and memory.
if [ "$DEVICE" = cuda ]; then
  found_gib=$("$PYTHON" -c '
import torch
print(torch.cuda.get_device_properties(0).total_memory >> 30 if torch.cuda.is_available() else 0)') || exit 2
  if [ "$found_gib" = 0 ]; then
    echo "gpu.sh: torch sees no CUDA GPU. For a dry run on the CPU: DEVICE=cpu $0" >&2
    exit 2
  fi
  preset=${PRESET:-internvit6b_224} blocks=48 resident_blocks=36 few_blocks=24 crop=504 batch=8 batches="4 16 1 2" steps=8 warmup=3 fit_steps=10
  resident_run=internvit6b_224_full_linear_ade20k
  offloaded=(one_gpu_80gib_full_linear_ade20k) large=(one_gpu_141gib_full_linear_ade20k)
else
  found_gib=80
  preset=${PRESET:-internvit_tiny} blocks=3 resident_blocks=2 few_blocks=1 crop=56 batch=2 batches="1 2" steps=2 warmup=1 fit_steps=8
  resident_run=demo
  offloaded=(demo --batch 2 --depth 3 --deepspeed-config ds_configs/deepspeed/zero3_bf16_offload_partly.json)
  large=(demo --batch 2 --depth 3)
fi
memory_gib=${MEMORY_GIB:-$found_gib}
[ "$memory_gib" -lt 130 ] || resident_blocks=$blocks
if [ "$memory_gib" -lt 70 ]; then
  echo "gpu.sh: a GPU of $memory_gib GiB is too small for what is measured here: it takes one of 80 or 141 GB" >&2
  exit 2
fi
"$PYTHON" -c 'import ds_seg.openmmlab, deepspeed, mmseg.models' 2>"$work/import.log" || {
  tail -n 3 "$work/import.log" >&2
  echo "gpu.sh: $PYTHON can't import ds_seg's packages: run make setup, name a Python that has them (PYTHON=...), or" >&2
  echo "collect wheels where there is a network (benchmarks/collect_wheels.sh) and name their folder (WHEELS=...)" >&2
  exit 2
}
VARIANTS=${VARIANTS:-ds_seg,fsdp2,ds_seg_compiled,fsdp2_compiled}
COMPILED=${COMPILED:-ds_seg_compiled,fsdp2_compiled}

# run NAME COMMAND...: within what is left of the part's time; output to the part's log, JSON to $work/NAME.json.
run() {
  local name=$1 left_s=$((ends_s - SECONDS)) started_s=$SECONDS code
  shift
  if [ "$left_s" -lt 20 ]; then
    echo "$name: left out, the part's time is over"
    echo "{\"command\": \"$name\", \"left_out\": true}" >"$work/$name.status"
    collect
    return
  fi
  { echo; echo "=== $name: $*"; } >>"$log"
  timeout -s "$stop_signal" -k 40 "$left_s" "$@" >>"$log" 2>&1 # it may still write what it measured
  code=$?
  echo "$name: exit code $code after $((SECONDS - started_s)) s"
  [ $code -eq 0 ] || { failed=1; tail -n 5 "$log" | sed 's/^/    /'; }
  echo "{\"command\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - started_s))}" >"$work/$name.status"
  collect
}

# The part's JSON, as far as it is measured.
collect() {
  "$PYTHON" - "$work" "$out/$part.json" <<'PYTHON'
import json, pathlib, sys
work = pathlib.Path(sys.argv[1])
figures = {"commands": [json.loads(path.read_text()) for path in sorted(work.glob("*.status"))]}
figures |= {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}
pathlib.Path(sys.argv[2]).write_text(json.dumps(figures, indent=1) + "\n")
PYTHON
}

step() { # BLOCKS BATCH CHECKPOINTING VARIANTS
  local name=blocks_$1_batch_$2_$3
  run "$name" "$PYTHON" benchmarks/step.py --device "$DEVICE" --world-size 1 --preset "$preset" --depth "$1" --crop "$crop" \
    --batch "$2" --checkpointing "$3" --variants "$4" --rounds 1 --steps "$steps" --warmup "$warmup" \
    --json "$work/$name.json"
}

fit() { # NAME, then arguments of one_batch.py
  local name=$1
  shift
  run "$name" "$PYTHON" benchmarks/one_batch.py "$@" --steps "$fit_steps" --json "$work/$name.json"
}

part_setup() {
  { command -v nvidia-smi && nvidia-smi; "$PYTHON" -m pip list --format=freeze; } >>"$log" 2>&1
  run facts "$PYTHON" benchmarks/device_facts.py --device "$DEVICE" --json "$work/facts.json"
  run doctor "$PYTHON" -m ds_seg doctor --json "$work/doctor.json"
  run build_cpu_adam "$PYTHON" -c 'from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()'
}

part_tests() {
  local stop_signal=INT # on which pytest writes its results so far
  local chosen=(-m gpu tests/gpu tests/e2e/test_demo.py tests/e2e/test_compile.py) # all that use the fixture `device`
  [ "$DEVICE" = cuda ] || chosen=(-m "not gpu" tests/gpu)
  run tests env -u DS_ACCELERATOR -u OMP_NUM_THREADS "$PYTHON" -m pytest "${chosen[@]}" -v -rs -p no:cacheprovider \
    --junitxml "$work/tests.xml"
  [ ! -f "$work/tests.xml" ] || "$PYTHON" -c '
import json, sys, xml.etree.ElementTree as tree
cases = {c.get("name"): next((child.tag for child in c if child.tag != "properties"), "passed")
         for c in tree.parse(sys.argv[1]).iter("testcase")}
json.dump(cases, open(sys.argv[2], "w"))' "$work/tests.xml" "$work/tests.json"
}

# What is computed again lowers the utilisation, so one measurement is made without: of fewer blocks where memory is short.
part_steps() {
  if [ "$resident_blocks" -eq "$blocks" ]; then
    step "$blocks" "$batch" selective "$VARIANTS"
  else
    step "$resident_blocks" "$batch" block "$VARIANTS"
    step "$few_blocks" "$batch" selective "$COMPILED"
  fi
}

part_batches() {
  local size
  for size in $batches; do step "$resident_blocks" "$size" block "$COMPILED"; done
}

part_fit() {
  if [ "$resident_blocks" -eq "$blocks" ]; then
    fit resident "${large[@]}"
    fit compiled "${large[@]}" --cfg-options compile=True
  else
    fit resident "$resident_run" --depth "$resident_blocks" --batch "$batch"
    fit offloaded "${offloaded[@]}"
  fi
}

failed=0 stop_signal=TERM
start_s=0 # of the first part it is this script's start: installing wheels takes of its time
for part in "${parts[@]}"; do
  ends_s=$((start_s + ${budget_s[$part]}))
  log=$out/$part.log
  # of a build that ran out of time in a folder of our own: later ones would wait for it without end
  [ -z "$extensions" ] || rm -f "$extensions"/*/lock
  echo "$part on $DEVICE, $memory_gib GiB, $(date -u +%FT%TZ)" | tee "$log"
  rm -f "$work"/*.json "$work"/*.status
  "part_$part"
  collect
  start_s=$SECONDS
done
echo "wrote $out"
exit $failed
