#!/bin/bash
# make fuzz: each target of tests/fuzz and the mutation test of export.py, FUZZ_SECONDS in all. A line each;
# what was found is kept in FINDINGS (fuzz-findings here). Names as arguments: only these.
cd "$(dirname "$0")/.."
targets=${*:-model tokenizer text options export}
each=$(( ${FUZZ_SECONDS:-60} / $(wc -w <<< "$targets") ))
findings=${FINDINGS:-fuzz-findings}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
failed=0

TOKENIZERS=tokenizer.bin
for name in llama3-2k qwen2-2k smollm-2k; do
    python3 export.py tests/data/tokenizers/$name/tokenizer.json "$place/$name" && TOKENIZERS+=:$place/$name
done
export TOKENIZERS

for target in $targets; do
    mkdir -p "$findings" "$place/$target"
    if [ "$target" = export ]; then
        python3 tests/fuzz_export.py --seconds "$each" ${SEED:+--seed $SEED} || failed=1
        continue
    fi
    FUZZ=$target tests/fuzz -max_total_time="$each" -timeout=5 -detect_leaks=0 -max_len=16384 -close_fd_mask=3 \
        -print_final_stats=1 ${SEED:+-seed=$SEED} -artifact_prefix="$findings/$target-" \
        "$place/$target" "tests/corpus/$target" > "$place/log" 2>&1
    status=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$place/log")
    slowest=$(sed -n 's/^stat::slowest_unit_time_sec: *//p' "$place/log")
    echo "fuzz $target: ${runs:-0} runs in $each s, slowest ${slowest:-?} s, status $status"
    [ $status = 0 ] || { failed=1; grep -v '^#' "$place/log" | tail -n 60; }
done
rmdir "$findings" 2> /dev/null
exit $failed
