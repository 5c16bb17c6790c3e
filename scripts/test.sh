#!/bin/bash
# Every test. Closes with one line: N passed, N failed, N skipped. What runs where:
#   - unit and integration tests on this machine, with /dev/kvm where it works (bare-metal guests do everywhere);
#   - Linux guests in the lab, all in one start of it as root and all in another as an ordinary user;
#   - the program that tries to leave the jail, here and in the lab;
#   - the seccomp policies, that no line of them is unused by the tests;
#   - the fuzz targets, a few seconds each.
# A test that cannot run here prints `SKIP: name: reason` and is counted as skipped.
set -eu -o pipefail
cd "$(dirname "$0")/.."
lab=$PWD/build/bin/shoal-lab
export SHOAL_BIN_DIR=$PWD/build/bin SHOAL_IMAGES=$PWD/build/images
mkdir -p build
log=build/test.log
: > "$log"
broken=

# A step's output goes to the terminal and the log; that it failed is remembered, so that the others still run.
step() { # NAME COMMAND…
    local name=$1
    shift
    echo "== $name" | tee -a "$log"
    "$@" 2>&1 | tee -a "$log" || { broken="$broken, $name"; }
}

# What a command that runs beside this one prints, to its end; its exit code is this function's.
joined() { # DESCRIPTOR
    local line code=1
    while IFS= read -r line; do
        case $line in
            "exit code "*) code=${line#exit code } ;;
            *) printf '%s\n' "$line" ;;
        esac
    done <&"$1"
    return "$code"
}

step "tests on this machine" cargo test --release --workspace --no-fail-fast -- --show-output
scripts/test-images.sh
scripts/build-tests.sh
# Machines of the lab have one processor each, so two run side by side.
beside() { # COMMAND…: its output and its exit code, for `joined`
    local code=0
    "$@" 2>&1 || code=$?
    echo "exit code $code"
}
exec {user}< <(beside scripts/lab-tests.sh user)
step "Linux guests in the lab, as root" scripts/lab-tests.sh root
step "Linux guests in the lab, as an ordinary user" joined "$user"
exec {policies}< <(beside scripts/policy-check.sh)
step "ways out of the jail" scripts/test-jail.sh
# Its sum in a harness's words, for the tally.
tail -n 1 "$log" | sed -n 's/^\([0-9]* passed\), \([0-9]* failed\)\(, \([0-9]*\) skipped\)\?$/test result: \1; \2; 0\4 ignored/p' >> "$log"
step "fuzz targets" scripts/fuzz.sh "${FUZZ_SECONDS:-5}"
step "seccomp policies" joined "$policies"

skipped=$(grep -hE '^(SKIP:|skipped) ' "$log" | sort -u || true)
[ -z "$skipped" ] || printf '== skipped\n%s\n' "$skipped"
echo "== all tests"
if [ -n "$broken" ]; then
    echo "failed steps:${broken#,}"
fi
"$lab" tally < "$log"
[ -z "$broken" ]
