# For the scripts that install: which Python, and how mmcv-full is built. Sourced, not run.

# The interpreter in PYTHON, else the first that ds_seg is for; ends the script where there is none.
find_python() {
  local candidate
  if [ -z "${PYTHON:-}" ]; then
    for candidate in python3 python3.11 python3.12 python3.10 python; do
      if command -v "$candidate" >/dev/null && _supported "$candidate"; then PYTHON=$candidate; break; fi
    done
  fi
  if [ -z "${PYTHON:-}" ] || ! _supported "$PYTHON"; then
    echo "$1: no Python 3.10, 3.11 or 3.12 found. Install one, or name it: PYTHON=/path/to/python" >&2
    exit 2
  fi
}

_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

# Run a command of pip (python, folder for a file, then pip's arguments) that builds mmcv-full: its setup imports
# pkg_resources, gone from setuptools 81 on. pip's option that constrains the build environment got its own name in 25.3;
# before 23.1 pip builds in such an environment only if it is told to.
pip_with_old_setuptools() {
  local python=$1 folder=$2 name=PIP_CONSTRAINT
  shift 2
  echo 'setuptools<81' >"$folder/build.txt"
  "$python" -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (25, 3))' &&
    name=PIP_BUILD_CONSTRAINT
  env "$name=$folder/build.txt" PIP_USE_PEP517=1 "$python" -m pip "$@"
}
