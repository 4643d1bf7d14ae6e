#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the native modules in place, without network, and runs stages of the GPU suite; docs/gpu.md says what they do.
# Without a GPU every stage runs at tiny sizes on the CPU. What is in the folder of results already is not repeated.
set -uo pipefail

STAGES="check speed train compile sanitize"
usage="usage: gpu_suite.sh [--out DIR] [--budget SECONDS] [--no-build] STAGE...   (of: $STAGES)"

refuse() {
  echo "gpu_suite.sh: $1" >&2
  echo "$usage" >&2
  exit 2
}

out=gpu-suite-results budget=450 build=yes chosen=()
while (($#)); do
  case $1 in
    --out | --budget)
      (($# > 1)) || refuse "$1: expected a value"
      [[ $1 == --out ]] && out=$2 || budget=$2
      shift 2
      ;;
    --no-build) build=no && shift ;;
    -h | --help) echo "$usage" && exit 0 ;;
    -*) refuse "unknown option '$1'" ;;
    *)
      [[ " $STAGES " == *" $1 "* ]] || refuse "unknown stage '$1', expected one of: $STAGES"
      chosen+=("$1") && shift
      ;;
  esac
done
((${#chosen[@]})) || refuse "expected a stage"
[[ $budget =~ ^[0-9]{1,5}$ ]] || refuse "--budget: expected whole seconds, got '$budget'"
[[ -n $out ]] || refuse "--out: expected a folder, got nothing"

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || refuse "PYTHON: expected an interpreter, got '${PYTHON:-python3}'"
python=$("$python" -c 'import sys; print(sys.executable)')
export PATH="$(dirname "$python"):$PATH:/usr/local/cuda/bin" # where nvcc usually is, if it is not on the path
mkdir -p "$out" || refuse "--out: expected a folder that can be written, got '$out'"
out=$(cd "$out" && pwd)
work=${GPU_SUITE_BUILD:-$repository/build/gpu}
mkdir -p "$work" && work=$(cd "$work" && pwd)

# cmake and ninja alone: pip would want the build backend in a certain version, and writes more than is needed.
compile() {
  local generator=() version
  command -v ninja >/dev/null && generator=(-G Ninja)
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$repository/pyproject.toml")
  cmake "${generator[@]}" -S "$repository" -B "$work/cmake" -DCMAKE_BUILD_TYPE=Release -DPYLEARNGENE_CUDA=AUTO \
    -DSKBUILD_PROJECT_NAME=pylearngene -DSKBUILD_PROJECT_VERSION="$version" -DPython_EXECUTABLE="$python" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" ${CMAKE_ARGS:-} "$@" &&
    cmake --build "$work/cmake" --parallel && cmake --install "$work/cmake" --prefix "$work/site"
}

# The package as the wheel lays it out, of links to the sources, beside the modules that were built.
lay_out() {
  local entry
  mkdir -p "$work/site/pylearngene"
  find "$work/site" -type l -delete
  for entry in "$repository"/pylearngene/*; do
    [[ $entry == *.so || $entry == */__pycache__ ]] || ln -s "$entry" "$work/site/pylearngene/"
  done
  ln -s "$repository/triton_kernels" "$work/site/pylearngene/triton_kernels"
}

here=$work/run # the folder of a process comes first on Python's path: not the one that holds the sources
if [[ $build == yes ]]; then
  began=$SECONDS
  if ! compile >"$work/build.log" 2>&1; then
    echo "the build failed, once more without CUDA; $work/build.log begins with why:" >&2
    grep -m 5 -i 'error' "$work/build.log" >&2
    compile -DPYLEARNGENE_CUDA=OFF >>"$work/build.log" 2>&1 || { tail -20 "$work/build.log" >&2 && exit 1; }
  fi
  lay_out
  echo "built in $((SECONDS - began)) s: $(cd "$work/site/pylearngene" && echo _*.so)"
  here=$work/site
fi
mkdir -p "$here"
[[ -e $here/benchmarks ]] || ln -s "$repository/benchmarks" "$here/benchmarks"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
cd "$here" || exit 1

worst=0
for stage in "${chosen[@]}"; do
  began=$SECONDS options=()
  for _ in 1 2 3 4 5 6; do # 75: the GPU was lost or something hung; the next process goes on behind it
    left=$((budget - (SECONDS - began)))
    ((left > 0)) || left=0
    timeout --kill-after=10 $((left + 30)) \
      "$python" -m benchmarks.gpu "$stage" --out "$out" --budget "$left" "${options[@]}" 2>&1 | tee -a "$out/$stage.log"
    code=${PIPESTATUS[0]}
    ((code == 75)) || break
    options=(--keep-failed)
  done
  if ((code > 1)); then
    echo "stage $stage ended with $code, see $out/$stage.log"
    code=1
  fi
  ((code > worst)) && worst=$code
done
"$python" -m benchmarks.gpu.goals "$out" || worst=1
exit "$worst"
