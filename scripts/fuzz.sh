#!/bin/sh
# Builds the fuzz targets and runs each of them for a while; fails when one finds something.
#
#   scripts/fuzz.sh [SECONDS_PER_TARGET [TARGET...]]
#
# Needs g++ for libFuzzer's run time; no nightly compiler. What is found (inputs that reach new code, crashes) stays in
# fuzz/corpus and fuzz/artifacts. To repeat a crash: run the target's program with the file as its argument.
set -eu

seconds=${1:-30}
[ $# -eq 0 ] || shift
cd "$(dirname "$0")/../fuzz"
triple=x86_64-unknown-linux-gnu
targets=${*:-"registers block net vsock console_ring sections kernel control api perf"}

# The flags that cargo-fuzz gives to a nightly compiler; a stable one knows them as well. They replace the static linking
# of .cargo/config.toml, which libFuzzer does not need.
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
export RUSTFLAGS
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/../target}/fuzz
export CARGO_TARGET_DIR
cargo build --release --target "$triple"

failed=
for target in $targets; do
    mkdir -p "corpus/$target" "artifacts/$target"
    echo "== $target: $seconds s"
    log=$CARGO_TARGET_DIR/$target.log
    if "$CARGO_TARGET_DIR/$triple/release/$target" "corpus/$target" -max_total_time="$seconds" \
        -artifact_prefix="artifacts/$target/" -timeout=10 -rss_limit_mb=2048 -max_len=4096 \
        -print_final_stats=1 -verbosity=0 >"$log" 2>&1; then
        grep -E 'number_of_executed_units|average_exec_per_sec' "$log"
    else
        tail -n 40 "$log"
        failed="$failed $target"
    fi
done
if [ -n "$failed" ]; then
    echo "fuzzing failed:$failed" >&2
    exit 1
fi
