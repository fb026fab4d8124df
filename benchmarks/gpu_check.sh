#!/usr/bin/env bash
# What a machine with a GPU is asked, most important first, in 6 minutes at most: the tests that need a GPU, the rows of
# benchmarks/train.py, a small run with device=cuda if time is left. `import btx` has to work or this tree's src is
# taken; no network is needed.
#
#   OUT=results benchmarks/gpu_check.sh               logs and JSON go into OUT (default: gpu-results)
#   MINUTES=10 ROWS=btx,small SETTINGS=compile=false benchmarks/gpu_check.sh
#   BASELINE=../other/src benchmarks/gpu_check.sh     times another btx's rows too
#   DEVICE=cpu SHAPE=hidden-256 LAYERS=1 benchmarks/gpu_check.sh     tries the script itself on a machine without a GPU
#
# Each part has its own time limit, and none that fails stops the next. OUT/summary.jsonl has a line each; the exit code
# is 1 if a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-results} DEVICE=${DEVICE:-cuda} MINUTES=${MINUTES:-6} PYTHON=${PYTHON:-python3}
SETTINGS=${SETTINGS:-} BASELINE=${BASELINE:-} SHAPE=${SHAPE:-} LAYERS=${LAYERS:-}
# btx against the compiled loop first: whether the goal is met; transformers' MoE last: 10 seconds a step.
ROWS=${ROWS:-btx,transformers-compile,btx-ff,btx-moe,floor,small,transformers,transformers-moe}
RUN_S=110 # what the small run is left: ten processes that import for 10 s each
END=$(awk "BEGIN {printf \"%d\", 60 * $MINUTES}") # bash counts SECONDS from the script's start
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
: >"$OUT/summary.jsonl"
failed=0

left() { echo $((END - SECONDS)); }

# part NAME SECONDS COMMAND...: run it for so long at most, its output into OUT/NAME.log, a line into the summary.
part() {
  local name=$1 limit=$2 started=$SECONDS code
  shift 2
  [ "$limit" -gt "$(left)" ] && limit=$(left)
  if [ "$limit" -lt 5 ]; then
    echo "{\"part\": \"$name\", \"left_out\": \"the time was used up\"}" | tee -a "$OUT/summary.jsonl"
    return
  fi
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log" | tail -n 25
  code=${PIPESTATUS[0]}
  [ "$code" -ne 0 ] && failed=1
  echo "{\"part\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - started)), \"limit_s\": $limit}" |
    tee -a "$OUT/summary.jsonl"
}

part machine 60 "$PYTHON" -c '
import json, platform, torch, transformers
gpu = torch.cuda.is_available()
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                  "transformers": transformers.__version__, "gpu": torch.cuda.get_device_name() if gpu else None}))
import btx
print("btx", btx.__version__, btx.__file__)'

# The suite's pytest settings name plugins that may be missing here, so they are left out; -rs says why tests skip.
mapfile -t files < <(grep -l 'mark\.gpu' tests/*.py tests/*/*.py)
if "$PYTHON" -c 'import hypothesis, pytest' 2>/dev/null; then
  part tests 75 "$PYTHON" -m pytest -c /dev/null --rootdir . -p no:cacheprovider -o markers=$'gpu\nlong' -q -rs -m gpu \
    "${files[@]}"
else
  echo '{"part": "tests", "left_out": "pytest and hypothesis are needed"}' | tee -a "$OUT/summary.jsonl"
fi

bench_s=$(($(left) - RUN_S))
part bench "$bench_s" "$PYTHON" benchmarks/train.py --device "$DEVICE" --alone --rows "$ROWS" \
  --output "$OUT/train.json" --minutes "$(awk "BEGIN {print ($bench_s - 10) / 60}")" \
  ${SETTINGS:+--settings "$SETTINGS"} ${SHAPE:+--shape "$SHAPE"} ${LAYERS:+--layers "$LAYERS"} \
  ${BASELINE:+--baseline "$BASELINE"}

# The demo, cut down: every stage once, on text that is made on the spot.
part run "$(left)" "$PYTHON" -m btx run demo device="$DEVICE" run="$OUT/demo" \
  seed_model.train.tokens=40_000 train.tokens=20_000 finetune.tokens=20_000 evaluate.tokens=5_000 \
  evaluate.tasks.math.questions=20 evaluate.tasks.knowledge.questions=20 evaluate.mixed.documents=20
for name in evaluate/results.json mix/done.json finetune/done.json; do
  [ -f "$OUT/demo/$name" ] && cp "$OUT/demo/$name" "$OUT/demo-${name//\//-}"
done
tail -q -n 1 "$OUT"/demo/*/metrics.jsonl "$OUT"/demo/train/*/metrics.jsonl >"$OUT/demo-metrics.jsonl" 2>/dev/null
rm -rf "$OUT/demo"
exit $failed
