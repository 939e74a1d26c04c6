#!/usr/bin/env bash
# Make .venv in the project's root and install ds_seg with its development tools into it.
#
#   PYTHON=/path/to/python   the interpreter to use (3.10 to 3.12); found by itself otherwise
#   TORCH="torch==2.11.0"    what to install where the interpreter has no torch of its own
#
# A torch that the interpreter already has is used as it is, and so is its torchvision. pip's own
# settings (find-links, index, proxy) are respected: on a machine without a GPU, point them to a CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.ds_seg_setup
fingerprint=$(cat constraints.txt pyproject.toml scripts/setup.sh | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ]; then exit 0; fi

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }
if [ -z "${PYTHON:-}" ]; then
  for candidate in python3 python3.11 python3.12 python3.10 python; do
    if command -v "$candidate" >/dev/null && supported "$candidate"; then PYTHON=$candidate; break; fi
  done
fi
if [ -z "${PYTHON:-}" ] || ! supported "$PYTHON"; then
  echo "setup: no Python 3.10, 3.11 or 3.12 found. Install one, or name it: make setup PYTHON=/path/to/python" >&2
  exit 2
fi

say() { echo "setup: $*"; }
say "making .venv with $("$PYTHON" --version)"
rm -rf .venv
"$PYTHON" -m venv .venv || {
  echo "setup: the interpreter can't make a virtual environment. On Debian: apt-get install python3-venv" >&2
  exit 2
}
python=.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp constraints.txt "$work/constraints.txt"

torch_folder=$("$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' 2>/dev/null || true)
if [ -n "$torch_folder" ]; then
  say "using the torch found in $torch_folder"
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$torch_folder" >"$site/existing_torch.pth"
  grep -vE '^(torch|torchvision)==' constraints.txt >"$work/constraints.txt"
  "$python" -c 'import torch; print("torch==" + torch.__version__)' >>"$work/constraints.txt"
else
  say "installing ${TORCH:=torch==2.13.0}"
  "$python" -m pip install -qq "$TORCH"
  if [ "$TORCH" != torch==2.13.0 ]; then
    grep -vE '^(torch|torchvision)==' constraints.txt >"$work/constraints.txt"
  fi
fi

# mmcv-full is a source package whose setup imports pkg_resources, gone from setuptools 81 on. pip's
# option that constrains the build environment got its own name in 25.3.
echo 'setuptools<81' >"$work/build.txt"
if "$python" -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (25, 3))'; then
  export PIP_BUILD_CONSTRAINT=$work/build.txt
else
  export PIP_CONSTRAINT=$work/build.txt
fi
say "installing mmcv-full (built from source without compiled operators)"
"$python" -m pip install -qq -c "$work/constraints.txt" mmcv-full==1.7.2
unset PIP_BUILD_CONSTRAINT PIP_CONSTRAINT

say "installing ds_seg and its other packages"
"$python" -m pip install -qq -c "$work/constraints.txt" -e '.[dev]'
if [ -n "$torch_folder" ]; then
  # what lies beside the torch that was found counts as installed, but its commands are not in .venv/bin
  "$python" -m pip install -qq -c "$work/constraints.txt" --ignore-installed --no-deps deepspeed ruff mypy pytest
fi
"$python" -c 'import ds_seg.openmmlab, mmseg.models, deepspeed' >"$work/import.log" 2>&1 || {
  cat "$work/import.log" >&2
  echo "setup: the installed packages do not import together; see above" >&2
  exit 1
}
echo "$fingerprint" >"$stamp"
say "done: $("$python" -c 'import torch; print("torch", torch.__version__, "with", "a GPU" if torch.cuda.is_available() else "CPU only")')"
