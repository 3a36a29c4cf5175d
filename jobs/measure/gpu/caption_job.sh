#!/usr/bin/env bash
# Runs the captioning job on the model of make_model.py and samples the GPU's load each second.
#
#   bash caption_job.sh true|false COPIES     # with LightKV or without; every clip COPIES times, 64 frames each
#
# Called by correctness.sh and figures.sh, which set KIT, OUT, WORK, MODEL and PYTHON. Writes $OUT/job-true.txt or
# job-false.txt: the job's output, its summary, the samples.
set -u
enabled=$1 copies=$2
videos=$WORK/videos sink=$WORK/captions-$enabled samples=$WORK/load-$enabled.csv log=$OUT/job-$enabled.txt
rm -rf "$videos" "$sink"
mkdir -p "$videos"
for clip in "$KIT"/clips/*; do
  for copy in $(seq "$copies"); do cp "$clip" "$videos/$copy-$(basename "$clip")"; done
done

nvidia-smi --query-gpu=timestamp,utilization.gpu,memory.used,power.draw --format=csv,noheader -l 1 > "$samples" &
sampler=$!
timeout -k 5 75 "$PYTHON" -m jobs.caption --config configs/caption.yaml \
  --set source.uri="$videos" --set sink.uri="$sink" \
  --set model.path="$MODEL" --set model.name=random-7b --set model.max_new_tokens=64 \
  --set lightkv.enabled="$enabled" --set lightkv.retention=0.25 \
  --set frames.strategy=uniform --set frames.count=64 \
  --set ray.actors.max=1 --set ray.actors.batch_units=16 > "$log" 2>&1
echo "job lightkv=$enabled rc $?"
kill "$sampler"

grep -vE "^\[|core_worker" "$log" | tail -18 | cut -c1-220
cat "$sink/_run/summary.json" "$samples" >> "$log" 2>/dev/null
awk -F, '
  {gsub(/[^0-9.]/, "", $2); n++; total += $2; if ($2 > 0) {busy++; load += $2}}
  END {if (n) printf "GPU load: mean %.0f%% of %d s; %.0f%% over the %d s in which it was above 0\n",
                     total / n, n, busy ? load / busy : 0, busy}' "$samples"
