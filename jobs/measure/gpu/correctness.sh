#!/usr/bin/env bash
# Correctness on a GPU, about 200 s: kernel tests, comparisons, the demo, the benchmark in small, a profile, one job.
#
#   bash DIR/correctness.sh
#
# A part that fails does not stop the others. Results are in $OUT (default ./out); failures are listed at the end.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

part() { # NAME SECONDS COMMAND …: output in $OUT/NAME.txt
  local name=$1 limit_s=$2
  shift 2
  timeout -k 5 "$limit_s" "$@" > "$OUT/$name.txt" 2>&1
  say "$name rc $?"
}
small() { part "$1" 110 "$PYTHON" -m jobs.measure.gpu.small_benchmark "$OUT/$1.json" "${@:2}"; }

# Side by side: most of the time goes into compiling kernels on the CPU.
part kernels 150 env TRITON_INTERPRET=0 "$PYTHON" -m pytest -p jobs.measure.gpu.kernel_tests_on_gpu \
  -p no:cacheprovider -q -n 8 --tb=short -k "not compile and not spill" tests/lightkv/ops &
part check 140 "$PYTHON" -m jobs.measure.gpu.check &
part demo 140 "$PYTHON" -m jobs.demo --out "$WORK/demo" &
make_model &
small small-benchmark &
(
  sleep 20
  small small-engine --suite engine
) &
wait

part profile 75 "$PYTHON" -m jobs.measure.gpu.profile_engine
bash "$KIT/caption_job.sh" true 2

say "what to look at"
grep -E "passed|failed" "$OUT/kernels.txt" | tail -1
grep -E "^(FAILED|ERROR)" "$OUT/kernels.txt" | cut -c1-200 | head -30
grep -E "^(BAD|bad)" "$OUT/check.txt" | cut -c1-200
grep -hE "failed|Error" "$OUT"/small-*.txt | cut -c1-250 | head -30
tail -4 "$OUT/demo.txt" | cut -c1-200
grep -E "^(==|prefill|decode|--)" "$OUT/profile.txt" | cut -c1-330
say end
