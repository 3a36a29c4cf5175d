# Sourced by correctness.sh and figures.sh: unpacks the kit once and prints what the machine has.
#
# Reads OUT (folder of the results, default ./out), WORK (scratch folder, default /tmp/lightkv-gpu) and PYTHON.
# Sets KIT (the folder of this script), MODEL (a folder for 17 GB, in memory if that has room) and CARD.
# Without project.tgz beside it, the checkout that holds this script is used, with what is installed.
set -u
export KIT OUT WORK MODEL PYTHON
KIT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python3}
WORK=${WORK:-/tmp/lightkv-gpu}
mkdir -p "$WORK/site" "${OUT:=out}"
OUT=$(cd "$OUT" && pwd)
STARTED=$(date +%s)
say() { echo "##### $(($(date +%s) - STARTED)) s: $*"; }
fail() {
  echo "$*" >&2
  exit 2
}

if [ -e "$KIT/project.tgz" ]; then
  PROJECT=$WORK/project
  mkdir -p "$PROJECT"
  tar xzf "$KIT/project.tgz" -C "$PROJECT" || fail "cannot unpack $KIT/project.tgz"
else
  PROJECT=$(cd "$KIT/../../.." && pwd)
fi
for part in ray rest; do
  if [ -e "$KIT/$part.txz" ] && [ ! -e "$WORK/$part.ready" ]; then
    (tar xJf "$KIT/$part.txz" -C "$WORK/site" && touch "$WORK/$part.ready") &
  fi
done
wait
for part in ray rest; do
  if [ -e "$KIT/$part.txz" ] && [ ! -e "$WORK/$part.ready" ]; then fail "cannot unpack $KIT/$part.txz"; fi
done
cd "$PROJECT" || exit 2
export PYTHONUNBUFFERED=1 PYTHONPATH="$PROJECT:$WORK/site"
# Ray then neither kills workers by its own count of memory nor hides the GPU from processes that reserve none.
export RAY_memory_monitor_refresh_ms=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0

MODEL=$WORK/model
free_gb=$(df --output=avail -BG /dev/shm 2>/dev/null | tail -1 | tr -dc 0-9)
if [ "${free_gb:-0}" -ge 60 ]; then MODEL=/dev/shm/lightkv-model; fi

NAME=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1)
[ -n "$NAME" ] || fail "expected a GPU that nvidia-smi lists, found none"
CARD=$(echo "$NAME" | grep -oE '[A-Z]+[0-9]+[A-Z]*' | head -1 | tr '[:upper:]' '[:lower:]') # NVIDIA H200 → h200
CARD=${CARD:-gpu}
VERSIONS='import sys, torch, triton, transformers as t; print(sys.version.split()[0], torch.__version__, triton.__version__, t.__version__)'
say "$NAME, $(nproc) CPUs; Python, torch, triton, transformers: $("$PYTHON" -c "$VERSIONS")"
df -h /dev/shm /tmp | tail -2
grep -E "MemTotal|MemAvailable" /proc/meminfo

make_model() { # writes the model unless it is there
  if [ -e "$MODEL/ready" ]; then return; fi
  timeout -k 5 100 "$PYTHON" -m jobs.measure.gpu.make_model "$MODEL" > "$OUT/make_model.txt" 2>&1 && touch "$MODEL/ready"
  say "make_model rc $?: $(tail -1 "$OUT/make_model.txt" | cut -c1-200)"
}
