#!/usr/bin/env bash
# Figures on a GPU, about 420 s, about 30 s less right after correctness.sh on the same machine.
#
#   bash DIR/figures.sh
#   BENCHMARK_MINUTES=3.2 ENGINE_MINUTES=2 bash DIR/figures.sh
#
# Result files are $OUT/benchmark-CARD.json and $OUT/engine-CARD.json; both are kept if the run is ended early.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
BENCHMARK_MINUTES=${BENCHMARK_MINUTES:-2.6}
ENGINE_MINUTES=${ENGINE_MINUTES:-1.5}
PROFILE_S=${PROFILE_S:-60}
MARGIN_S=40 # imports and the last cell

limit_s() { awk -v minutes="$1" -v margin="$MARGIN_S" 'BEGIN {printf "%d", 60 * minutes + margin}'; }
benchmark() { # NAME MINUTES OPTIONS …
  timeout -k 5 "$(limit_s "$2")" "$PYTHON" -m jobs.measure.benchmark --device cuda \
    --json "$OUT/$1-$CARD.json" --minutes "$2" "${@:3}" > "$OUT/$1.txt" 2>&1
  say "$1 rc $?, $(grep -cE ' measured$' "$OUT/$1.txt") cells measured"
  grep failed "$OUT/$1.txt" | cut -c1-200 | head -12
}

make_model
benchmark benchmark "$BENCHMARK_MINUTES" --models qwen2.5-vl-7b
benchmark engine "$ENGINE_MINUTES" --suite engine
bash "$KIT/caption_job.sh" true 6
bash "$KIT/caption_job.sh" false 6
timeout -k 5 "$PROFILE_S" "$PYTHON" -m jobs.measure.gpu.profile_engine > "$OUT/profile.txt" 2>&1
say "profile rc $?"
grep -E "^(==|prefill|decode|--)" "$OUT/profile.txt" | cut -c1-300
say end
