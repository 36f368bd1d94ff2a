#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in at most ten minutes, on a machine without network:
#   bash benchmarks/gpu_suite.sh [--out DIR] [--only STAGE[,STAGE...]] [--minutes N]
# Stages: tests, determinism, sanitizer, kernels, end_to_end. One that passed before, by DIR/summary.json, is not run
# again unless --only names it. DIR is $OUT, else gpu-suite; at most eight files come to lie there, logs, CSV and the
# other plots in details.tar.gz. Each stage has its share of the time that is left; what was cut the summary says.
# Exit status: 0 all passed (or skipped), 1 a stage failed, 2 no CUDA device or bad usage, 3 a stage was cut.
# PYTHON names the interpreter; PTENGINE_REVISION the revision where there is no .git.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-gpu-suite}
minutes=10
all=(tests determinism sanitizer kernels end_to_end)
named=()
declare -A share=([tests]=28 [determinism]=6 [sanitizer]=10 [kernels]=36 [end_to_end]=20)

usage() { echo "gpu_suite.sh: $1; see the head of $root/benchmarks/gpu_suite.sh" >&2; exit 2; }
while (($#)); do
    (($# >= 2)) || usage "expected a value after $1"
    case $1 in
        --out) out=$2 ;;
        --minutes) minutes=$2 ;;
        --only) IFS=, read -ra named <<<"$2" ;;
        *) usage "expected --out, --only or --minutes, got $1" ;;
    esac
    shift 2
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || usage "expected whole minutes of at least 1, got $minutes"
for stage in "${named[@]+"${named[@]}"}"; do
    [[ -n ${share[$stage]+known} ]] || usage "expected stages of ${all[*]}, got $stage"
done

# The checkout is not installed there; Triton's interpreter and a forced backend would make all of it worthless.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset TRITON_INTERPRET PTENGINE_BACKEND
bench=$root/benchmarks
"$python" "$bench/gpu_report.py" check "$out" || exit 2

out=$(cd "$out" && pwd)
details=$(mktemp -d)
trap 'rm -rf "$details"' EXIT
if [[ -f $out/details.tar.gz ]]; then tar -xzf "$out/details.tar.gz" -C "$details"; fi
end=$((SECONDS + minutes * 60 - 20)) # what the interpreter's starts and the summary take

# run SECONDS LOG COMMAND...: appends to `exits`; a command out of time is interrupted, so that it may still write.
run() {
    local seconds=$1 log=$details/$2.log code=0
    shift 2
    if ((seconds < 5)); then
        echo "no time left for: $*" >>"$log"
        exits+=(124)
        return
    fi
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >>"$log" 2>&1 || code=$?
    exits+=("$code")
}

left() { echo $((stage_end - SECONDS)); }

# Options that pyproject.toml asks for may belong to plug-ins that are not installed; several processes compile side by
# side where pytest-xdist is.
run_tests() {
    local workers=()
    if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 14); fi
    report+=(--junit "$details/$stage.xml")
    rm -f "$details/$stage.xml"
    cd "$root"
    run "$(left)" "$stage" "$python" -m pytest -q --import-mode=importlib -o addopts= -p no:cacheprovider \
        "${workers[@]+"${workers[@]}"}" --junit-xml="$details/$stage.xml" -k "$1" \
        tests/kernels/test_prefix_attention_triton.py tests/kernels/test_linear_cross_entropy_triton.py \
        tests/kernels/test_prefix_concat_triton.py tests/kernels/test_prefix_concat_varlen.py \
        tests/kernels/test_prefix_concat_paged.py \
        tests/kernels/test_gated_activation.py tests/kernels/test_rotary.py tests/backbone/test_decoding.py::TestOnTheGpu \
        tests/backbone/test_step_recording.py::TestOnTheGpu
}
stage_tests() { run_tests "not (bitwise or same_bits)"; }
stage_determinism() { run_tests "bitwise or same_bits"; } # 250 repeats each

stage_sanitizer() {
    local tool from
    if ! command -v compute-sanitizer >/dev/null; then
        echo "skipped: compute-sanitizer is not on PATH" | tee -a "$details/$stage.log"
        report+=(--note "compute-sanitizer is not on PATH")
        exits+=(77)
        return
    fi
    run "$(left)" "$stage" "$python" "$bench/sanitize_case.py" # compiles
    for tool in memcheck racecheck; do
        from=$(wc -l <"$details/$stage.log")
        # Every allocation on its own: a caching allocator hides accesses beyond a tensor's end.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$([[ $tool == memcheck ]] && echo $(($(left) / 2)) || left)" "$stage" \
            compute-sanitizer --tool "$tool" --error-exitcode 99 "$python" "$bench/sanitize_case.py"
        if grep -q 'Device not supported' < <(tail -n "+$((from + 1))" "$details/$stage.log"); then
            exits[-1]=77
            report+=(--note "compute-sanitizer $tool does not support this device")
        fi
    done
}

# kernel_benchmark NAME SECONDS [OPTION...]
kernel_benchmark() {
    local name=$1 seconds=$2 picture=$details
    shift 2
    if [[ $name == prefix_attention ]]; then picture=$out; fi
    report+=("$out/$name.json")
    rm -f "$out/$name.json"
    run "$((seconds + 15))" "$name" "$python" "$bench/bench_$name.py" --device cuda --dtype bfloat16 \
        --seconds "$seconds" --json "$out/$name.json" --csv "$details/$name.csv" --png "$picture/$name.png" "$@"
}

stage_kernels() {
    local whole
    whole=$(left)
    report+=(--results)
    kernel_benchmark prefix_concat $((whole / 10))
    kernel_benchmark linear_cross_entropy $((whole / 10))
    kernel_benchmark frozen_layers $((whole / 14))
    kernel_benchmark prefix_attention $(($(left) - 15)) --graph --warm 14 --repeats 9
}

stage_end_to_end() {
    report+=(--results "$out/end_to_end.json")
    rm -f "$out/end_to_end.json"
    run "$(left)" "$stage" "$python" "$bench/bench_end_to_end.py" --device cuda --dtype bfloat16 \
        --seconds $(($(left) - 30)) --json "$out/end_to_end.json" --png "$details/end_to_end.png"
}

wanted=()
for stage in "${all[@]}"; do
    if ((${#named[@]})); then
        if [[ " ${named[*]} " == *" $stage "* ]]; then wanted+=("$stage"); fi
    elif [[ $("$python" "$bench/gpu_report.py" status "$out" "$stage") == passed ]]; then
        echo "$stage: passed before, not run again (--only $stage runs it)"
    else
        wanted+=("$stage")
    fi
done

for ((i = 0; i < ${#wanted[@]}; i++)); do
    stage=${wanted[i]}
    shares=0
    for later in "${wanted[@]:i}"; do shares=$((shares + share[$later])); done
    begun=$SECONDS
    budget=$(((end - SECONDS) * share[$stage] / shares))
    stage_end=$((SECONDS + budget))
    exits=() report=()
    echo "$stage: at most $budget s"
    rm -f "$details/$stage.log"
    "stage_$stage"
    "$python" "$bench/gpu_report.py" record "$out" "$stage" --exit "${exits[@]}" \
        --seconds $((SECONDS - begun)) --budget "$budget" "${report[@]+"${report[@]}"}"
    tar -czf "$details.tar.gz" -C "$details" . && mv "$details.tar.gz" "$out/details.tar.gz"
done

code=0
"$python" "$bench/gpu_report.py" finish "$out" || code=$?
exit "$code"
