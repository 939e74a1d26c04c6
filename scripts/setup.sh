#!/usr/bin/env bash
# Make .venv in the project's root and install ds_seg with its development tools into it.
#
#   PYTHON=/path/to/python   the interpreter to use (3.10 to 3.12); found by itself otherwise
#   TORCH="torch==2.11.0"    what to install where the interpreter has no torch of its own
#   WHEELS=folder            install from a folder that benchmarks/collect_wheels.sh made, without a network
#
# A torch that the interpreter already has is used as it is, and so is its torchvision. pip's own
# settings (find-links, index, proxy) are respected: on a machine without a GPU, point them to a CPU build.
#
# A choice that .venv was not made with makes it anew, as another constraints.txt does. One that is not given stays what
# it was; `make clean` forgets them all.
set -euo pipefail
wheels=${WHEELS:+$(realpath -m "$WHEELS")}
cd "$(dirname "$0")/.."
. scripts/python.sh

stamp=.venv/.ds_seg_setup
kept() { [ ! -f "$stamp" ] || sed -n "s/^$1=//p" "$stamp"; }
PYTHON=${PYTHON:-$(kept PYTHON)} TORCH=${TORCH:-$(kept TORCH)} wheels=${wheels:-$(kept WHEELS)}
made_with=$(
  cat constraints.txt pyproject.toml scripts/setup.sh scripts/python.sh | cksum
  printf '%s\n' "PYTHON=$PYTHON" "TORCH=$TORCH" "WHEELS=$wheels"
)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$made_with" ]; then exit 0; fi

if [ -n "$wheels" ] && ! compgen -G "$wheels/mmcv_full-*.whl" >/dev/null; then
  echo "setup: WHEELS=$wheels is no folder with wheels of ds_seg's packages. Make one where there is a network:" >&2
  echo "  benchmarks/collect_wheels.sh $wheels" >&2
  exit 2
fi
PATH=${PATH//"$(pwd -P)/.venv/bin:"/} # an activated .venv can't make its successor
find_python setup
say() { echo "setup: $*"; }
say "making .venv with $("$PYTHON" --version)$([ ! -f "$stamp" ] || echo ", anew: what it was made with has changed")"
rm -rf .venv
"$PYTHON" -m venv .venv || {
  echo "setup: the interpreter can't make a virtual environment. On Debian: apt-get install python3-venv" >&2
  exit 2
}
python=.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

torch_folder=$("$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' 2>/dev/null || true)
if [ -n "$wheels" ] && compgen -G "$wheels/torch-*.whl" >/dev/null; then torch_folder=; fi
if [ -n "$TORCH" ] && [ -n "$torch_folder$wheels" ]; then
  say "TORCH=$TORCH has no say here: torch comes from ${torch_folder:-$wheels}"
fi
if [ -n "$torch_folder" ]; then
  say "using the torch found in $torch_folder"
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$torch_folder" >"$site/existing_torch.pth"
fi

install_from_network() {
  local pinned installed
  pinned=$(grep '^torch==' constraints.txt)
  if [ -z "$torch_folder" ]; then
    say "installing ${TORCH:=$pinned}"
    "$python" -m pip install -qq "$TORCH"
  fi
  installed=torch==$("$python" -c 'import importlib.metadata; print(importlib.metadata.version("torch"))')
  cp constraints.txt "$work/constraints.txt"
  if [ "${installed%%+*}" != "$pinned" ]; then
    { grep -vE '^(torch|torchvision)==' constraints.txt; echo "$installed"; } >"$work/constraints.txt"
  fi
  say "installing mmcv-full (built from source without compiled operators)"
  pip_with_old_setuptools "$python" "$work" install -qq -c "$work/constraints.txt" mmcv-full==1.7.2
  say "installing ds_seg and its other packages"
  "$python" -m pip install -qq -c "$work/constraints.txt" -e '.[dev]'
  if [ -n "$torch_folder" ]; then
    # what lies beside the torch that was found counts as installed, but its commands are not in .venv/bin
    "$python" -m pip install -qq -c "$work/constraints.txt" --ignore-installed --no-deps deepspeed ruff mypy pytest
  fi
}

# The folder has one version of each package that this machine lacks, so there is nothing to resolve.
install_from_wheels() {
  if [ -z "$torch_folder" ] && ! compgen -G "$wheels/torch-*.whl" >/dev/null; then
    echo "setup: neither $PYTHON nor $wheels has torch. Name a Python that has it (PYTHON=...), or collect the" >&2
    echo "wheels again without --without-torch." >&2
    exit 2
  fi
  say "installing the wheels in $wheels"
  find "$wheels" -name '*.whl' ! -name 'ds_seg-*' >"$work/wheels.txt"
  "$python" -m pip install -qq --no-index --no-deps --ignore-installed -r "$work/wheels.txt"
  "$python" -m pip install -qq --no-index --find-links "$wheels" --no-deps -e .
  "$python" -m pip check || say "what pip misses above may be there under another name; the import test decides"
}

if [ -n "$wheels" ]; then install_from_wheels; else install_from_network; fi
"$python" -c 'import ds_seg.openmmlab, mmseg.models, deepspeed' >"$work/import.log" 2>&1 || {
  cat "$work/import.log" >&2
  echo "setup: the installed packages do not import together; see above" >&2
  exit 1
}
echo "$made_with" >"$stamp"
say "done: $("$python" -c 'import torch; print("torch", torch.__version__, "with", "a GPU" if torch.cuda.is_available() else "CPU only")')"
