#!/usr/bin/env bash
# Everything a GPU has to say in one lease, from a bare tree: builds what is missing, then runs bench.gpu.
#
#   [OUT=FOLDER] [PYTHON=python3] bench/lease.sh [--minutes N] [OPTION OF bench.gpu ...]
#
# Needs a Python with torch, triton and numpy, and nvcc for the optimizer where kernels/_adamw_ema_cuda.so was not
# brought along; installs nothing. Plans for N minutes from its own start, 9 where not given, building included: what is
# of most worth comes first, and the files in OUT (bench/results/gpu) are written as it goes. What was left out can run
# in a second call: --only SECTION .... The exit code is bench.gpu's: 1 where a check failed, 2 where it cannot run.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-bench/results/gpu}
minutes=9
arguments=()
while (($#)); do
  case $1 in
    --minutes) minutes=${2:?"--minutes is the last word, expected a number after it"}; shift ;;
    --minutes=*) minutes=${1#*=} ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

mkdir -p "$out"
log() { printf '%s s: %s\n' "$SECONDS" "$*" | tee -a "$out/lease.log" >&2; }

# The optimizer's CUDA library into kernels/, whole or not at all; as CMakeLists.txt has it, but for this chip alone.
build() {
  local nvcc home work chip
  nvcc=$(command -v "${CUDACXX:-nvcc}" || true)
  for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
    [ -n "$nvcc" ] || { [ -n "$home" ] && [ -x "$home/bin/nvcc" ] && nvcc=$home/bin/nvcc; } || true
  done
  [ -n "$nvcc" ] || { log "nvcc was found neither as CUDACXX, nor on PATH, nor in CUDA_HOME/bin"; return 1; }
  chip=$("$python" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")' 2>> "$out/lease.log") || {
    log "torch finds no GPU to build csrc for"
    return 1
  }
  work=$(mktemp -d)
  if "$nvcc" -O3 --fmad=false -std=c++17 -arch="sm_$chip" -cudart static -shared -Xcompiler -fPIC,-fvisibility=hidden \
    -Xlinker --exclude-libs,ALL -o "$work/library" csrc/adamw_ema.cu > "$out/build.log" 2>&1; then
    mv "$work/library" kernels/_adamw_ema_cuda.so
    log "built kernels/_adamw_ema_cuda.so for sm_$chip"
  else
    log "nvcc failed, see $out/build.log"
    rm -rf "$work"
    return 1
  fi
  rm -rf "$work"
}

export PYTHONPATH="$PWD:$PWD/.ci/typings${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# One that was brought along but is of other sources, or does not load here, is built anew.
usable() { "$python" -c 'import sys; from lsep_kernels.adamw_ema import why_missing; sys.exit(why_missing() or 0)'; }
if ! usable 2>> "$out/lease.log"; then
  build || log "without csrc: sections that need it will fail"
fi

left=$("$python" -c 'import sys; print(max(0.5, float(sys.argv[1]) - float(sys.argv[2]) / 60))' "$minutes" "$SECONDS")
log "bench.gpu plans for $left minutes"
code=0
"$python" -m bench.gpu --minutes "$left" --json "$out/gpu.json" --markdown "$out/gpu.md" "${arguments[@]}" \
  2> >(tee -a "$out/lease.log" >&2) || code=$?
log "bench.gpu ended with $code"
exit "$code"
