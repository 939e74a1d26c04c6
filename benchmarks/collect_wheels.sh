#!/usr/bin/env bash
# Collect ds_seg and all it needs as wheels in one folder, for machines without a network.
#
#   benchmarks/collect_wheels.sh FOLDER [--without-torch] [--have FILE] [--no-dev] [--python 3.12] [--glibc 2.28]
#
#   --without-torch  the target has torch and torchvision (a cluster's module, say) of the versions in
#                    constraints.txt: neither is collected, nor the CUDA packages behind them
#   --have FILE      the target has these packages (its `pip list --format=freeze`): none is collected, and
#                    the others suit its versions. A line that is a name alone is left out in any version
#   --no-dev         only what a run needs, nothing for tests and linters
#   --python 3.12    the target's Python, where it is not this machine's
#   --glibc 2.28     the target's C library (ldd --version), where it is older than this machine's
#
# It needs a network, and PYTHON (found by itself) with pip; pip's own settings are respected. What is published as
# source alone is built here, without compiled operators, so it suits every Python. On the target:
#
#   make setup WHEELS=FOLDER                                    with a checkout
#   pip install --no-index --find-links FOLDER ds_seg           without one
set -euo pipefail
from_source="mmcv-full deepspeed"  # no wheels of these are published

fail() { echo "collect_wheels: $*" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/scripts/python.sh"
folder= have= without_torch= target_python= glibc= extras='[dev]'
while [ $# -gt 0 ]; do
  case $1 in
    --without-torch) without_torch=1 ;;
    --no-dev) extras= ;;
    --have | --python | --glibc)
      [ $# -gt 1 ] || fail "$1 needs a value"
      case $1 in --have) have=$2 ;; --python) target_python=$2 ;; --glibc) glibc=$2 ;; esac
      shift ;;
    -*) fail "unknown option $1; the head of $0 lists them" ;;
    *) [ -z "$folder" ] || fail "one folder, got $folder and $1"; folder=$1 ;;
  esac
  shift
done
[ -n "$folder" ] || fail "name a folder: benchmarks/collect_wheels.sh wheels"
[ -z "$have" ] || [ -f "$have" ] || fail "--have $have: no such file. Make it on the target: pip list --format=freeze"
[ -z "$target_python" ] || [[ $target_python =~ ^3\.1[012]$ ]] || fail "--python $target_python: want 3.10, 3.11 or 3.12"
[ -z "$glibc" ] || [[ $glibc =~ ^2\.[0-9]+$ ]] || fail "--glibc $glibc: want a version such as 2.28"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
[ -z "$(ls -A "$folder")" ] || fail "$folder is not empty, and two versions of one package stop an installation. Empty it, or name another"
find_python collect_wheels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/stand_ins" "$work/own"
pip=("$PYTHON" -m pip)

# What the target has: stand-ins for pip's resolver, which must choose them, whatever the constraints say.
touch "$work/have.txt"
[ -z "$have" ] || sed 's/[[:space:]]//g; /^$/d; /^#/d; /@/d; /^-/d' "$have" | grep -vE '^setuptools(=|$)' >"$work/have.txt" || true # make setup builds with it
[ -z "$without_torch" ] || grep -E '^(torch|torchvision)==' "$root/constraints.txt" >>"$work/have.txt"
names=$(sed 's/==.*//' "$work/have.txt" | tr 'A-Z_.' 'a-z--')
"$PYTHON" "$root/benchmarks/stand_in_wheels.py" "$work/stand_ins" <"$work/have.txt" >"$work/constraints.txt"
while read -r line; do
  name=$(sed 's/[=<>; ].*//' <<<"$line" | tr 'A-Z_.' 'a-z--')
  grep -qxF "$name" <<<"$names" || echo "$line"
done < <(grep -v '^#' "$root/constraints.txt") >>"$work/constraints.txt"

echo "collect_wheels: building $from_source and ds_seg"
for name in $from_source; do
  wanted=$(grep "^$name==" "$root/constraints.txt")
  pip_with_old_setuptools "$PYTHON" "$work" wheel -qq --no-deps --no-binary "$name" -w "$work/own" "$wanted"
done
mkdir "$work/source" # a copy: builds leave their traces in the folder they build
cp -r "$root"/{ds_seg,ds_configs,pyproject.toml,README.md,LICENSE} "$work/source"
"${pip[@]}" wheel -qq --no-deps -w "$work/own" "$work/source"
for wheel in "$work"/own/*.whl; do
  case $wheel in *-none-any.whl) ;; *) fail "$(basename "$wheel") suits this machine alone: build where no torch is installed" ;; esac
done

platform=()
if [ -n "$glibc" ] || [ -n "$target_python" ]; then
  platform=(--implementation cp --python-version "${target_python:-$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}")
  machine=$(uname -m)
  own=$("$PYTHON" -c 'import platform; print(platform.libc_ver()[1])')
  newest=${glibc:-$own}
  for minor in $(seq "${newest#2.}" -1 17); do platform+=(--platform "manylinux_2_${minor}_$machine"); done
  platform+=(--platform "manylinux2014_$machine")
  if [ "$machine" = x86_64 ]; then
    for name in manylinux_2_12 manylinux2010 manylinux_2_5 manylinux1; do platform+=(--platform "${name}_x86_64"); done
  fi
fi
echo "collect_wheels: collecting"
"${pip[@]}" download -qq -d "$folder" -c "$work/constraints.txt" --find-links "$work/own" --find-links "$work/stand_ins" \
  --only-binary=:all: "${platform[@]}" "ds_seg$extras" 'setuptools>=77'

for wheel in "$folder"/*.whl; do # stand-ins, and what was to be left out in any version
  name=$(basename "$wheel")
  name=$(tr 'A-Z_.' 'a-z--' <<<"${name%%-*}")
  if grep -qxF -- "$name" <<<"$names"; then rm "$wheel"; fi
done
echo "collect_wheels: $(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sm "$folder" | cut -f1) MiB. Install them with"
echo "  make setup WHEELS=$folder"
