#!/usr/bin/env bash
# All GPU measurements of das_ds in one run on a bare machine: tests, bandwidths, step times and MFU, peers, stop and
# resume, and evidence in the remaining time.
#
#   benchmarks/device/run.sh [--dry] [--minutes M] [--wheels FOLDER] [--out FOLDER] [--only PART]...
#
#   --dry      tiny sizes on the CPU, to check that every part runs (`make bench-device-dry`)
#   --minutes  time limit of all parts together; default 12
#   --wheels   missing packages, installed without an index
#   --out      folder for results.tar.gz (result files and logs), summary.json and log.txt; default runs/device
#   --only     run only this part; may be repeated
#
# Every part has its own time limit, and results are written as they come. A part that fails is counted and named; the
# others still run, and the exit code is 0 if all of them ended.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

dry=0 minutes=12 wheels="" out=runs/device only=" "
while (($#)); do
  case $1 in
    --dry) dry=1 ;;
    --minutes) minutes=$2; shift ;;
    --wheels) wheels=$2; shift ;;
    --out) out=$2; shift ;;
    --only) only+="$2 "; shift ;;
    *) echo "run.sh: found $1; allowed: --dry, --minutes M, --wheels FOLDER, --out FOLDER, --only PART" >&2; exit 2 ;;
  esac
  shift
done

mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/results"
: > "$work/parts.tsv"
log=$out/log.txt
: > "$log"
deadline=$((SECONDS + minutes * 60))

python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled DAS_DS_BENCHMARK_RESULTS="$work/results"

# Publishes the results so far, so that they survive an early end.
publish() {
  "$python" - "$work/parts.tsv" > "$out/summary.json" <<'PYTHON'
import json, sys
rows = [line.rstrip("\n").split("\t") for line in open(sys.argv[1], encoding="utf-8")]
parts = [{"part": name, "outcome": outcome, "seconds": int(seconds)} for name, outcome, seconds in rows]
failed = sum(part["outcome"].startswith("failed") for part in parts)
print(json.dumps({"failed": failed, "parts": parts}, indent=2))
PYTHON
  cp "$log" "$work/results/log.txt"
  tar -czf "$out/results.tar.gz" -C "$work/results" .
}

# part NAME SECONDS COMMAND...
part() {
  local name=$1 limit=$2 begin=$SECONDS left=$((deadline - SECONDS)) code outcome
  shift 2
  if [[ $only != " " && $only != *" $name "* ]]; then return; fi
  if ((left < 15)); then
    outcome="left out: no time"
  else
    # The dry run shows whether parts work, on a machine that others may use; the device is this run's alone.
    ((dry)) && limit=$((limit * 6))
    ((limit < left)) || limit=$left
    echo "=== $name (at most $limit s): $*" | tee -a "$log"
    timeout --kill-after=10 "$limit" "$@" >> "$log" 2>&1 < /dev/null
    code=$?
    case $code in
      0) outcome="passed" ;;
      # Evidence that saved itself because time was up.
      75) outcome="passed: stopped, to be continued" ;;
      124 | 137) outcome="failed: ran past $limit s" ;;
      *) outcome="failed: exit code $code" ;;
    esac
  fi
  printf '%s\t%s\t%s\n' "$name" "$outcome" "$((SECONDS - begin))" >> "$work/parts.tsv"
  echo "--- $name: $outcome, $((SECONDS - begin)) s" | tee -a "$log"
  publish
}

install() {
  if [[ -n $wheels ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$work/site" "$wheels"/*.whl
  fi
}
environment() {
  command -v nvidia-smi > /dev/null && nvidia-smi
  "$python" -m benchmarks.device.environment
}
export PYTHONPATH="$PYTHONPATH:$work/site"
export -f install environment
export python wheels work

if ((dry)); then
  encoder=(--model tiny-encoder --batch-size 4 --sequence-length 16 --precision fp32 --steps 2)
  decoder=(--model tiny-decoder --batch-size 2 --sequence-length 16 --precision fp32 --steps 2)
  kernel_tests=(tests/unit/kernels/test_masked_scale.py)
  engine_tests=(tests/full/test_gpu.py -k 2)
  kernels=(--sizes 1e4 --repeats 1)
  peers=(--sizes tiny --batch-sizes 2 --sequence-length 32 --steps 5 --rounds 1)
  resume=(--dry)
else
  encoder=(--model roberta-base --batch-size 64 --sequence-length 512 --precision bf16 --timeout 45)
  decoder=(--model llama-1.5b --batch-size 8 --sequence-length 2048 --precision bf16 --timeout 70)
  kernel_tests=(tests/unit/kernels)
  engine_tests=(tests/full/test_gpu.py)
  kernels=(--sizes 1e8 1e9)
  peers=(--sizes roberta-base --batch-sizes 32 --sequence-length 256 --precision bf16 --steps 30 --rounds 1)
  resume=()
fi

part install 90 bash -c install
part environment 60 bash -c environment
part kernel_tests 120 "$python" -m pytest -q -m "gpu or not gpu" "${kernel_tests[@]}"
part engine_tests 120 "$python" -m pytest -q -m gpu "${engine_tests[@]}"
part kernels 90 "$python" -m benchmarks.kernels "${kernels[@]}" --without deepspeed compile
part mfu_encoder 150 "$python" -m benchmarks.mfu "${encoder[@]}" --zero-stage 1
part mfu_decoder 240 "$python" -m benchmarks.mfu "${decoder[@]}" --zero-stage 1
part stop_and_resume 120 "$python" -m benchmarks.device.stop_and_resume "${resume[@]}"
part peers 150 "$python" -m benchmarks.peers "${peers[@]}"
if [[ -n ${DAS_DS_DATA:-} ]] && ((!dry)); then
  left=$(((deadline - SECONDS - 30) / 60))
  ((left < 1)) || part evidence $((left * 60 + 25)) "$python" -m benchmarks.domains gpu --minutes "$left"
else
  echo "--- evidence: left out, DAS_DS_DATA names no corpora" | tee -a "$log"
fi
publish
echo "$(grep -c . "$work/parts.tsv") parts, $(grep -c $'\tfailed' "$work/parts.tsv") failed; results: $out"
