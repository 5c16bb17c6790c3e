#!/bin/bash
# Are the seccomp policies minimal? Runs the tests that start guests, here (where /dev/kvm opens) and in the lab, with
# every system call of the VMMs counted, and fails when a policy allows one that no run used, or lacks one that a run
# needed. `make build` and the tests' programs and images (scripts/test-images.sh, scripts/build-tests.sh) come first.
set -eu -o pipefail
cd "$(dirname "$0")/.."
root=$PWD
bin=$root/build/bin
export SHOAL_BIN_DIR=$bin SHOAL_IMAGES=$root/build/images SHOAL_SECCOMP=trace
traces=$(mktemp -d)
trap 'rm -rf "$traces"' EXIT
failed=

# One line of PASSED or what failed; the whole output only when it did.
traced() { # NAME DIRECTORY PROGRAM
    if (cd "$2" && "$bin/shoal-jailer" trace --output "$traces/$1" -- "$3") > "$traces/log" 2>&1; then
        echo "policy-check: traced $1"
    else
        failed="$failed $1"
        cat "$traces/log"
    fi
}

if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then
    for package in api-server:shoald cli:shoal-cli host:shoal-host; do
        # cargo names each program by a hash; its messages tell where it lies.
        cargo test --quiet --release --no-run -p "${package#*:}" --test '*' --message-format=json |
            sed -n 's/.*"kind":\["test"\].*"name":"\([^"]*\)".*"executable":"\([^"]*\)".*/\1 \2/p' > "$traces/programs"
        while read -r name program; do
            traced "${package#*:}-$name" "$root/${package%%:*}" "$program"
        done < "$traces/programs"
        rm "$traces/programs"
    done
else
    echo "SKIP: policy-check on this machine: /dev/kvm does not open"
fi

# With a clock that cannot be read without the kernel, as some hosts have.
lab_run='echo acpi_pm > /sys/devices/system/clocksource/clocksource0/current_clocksource
    shoal-jailer trace --output /tmp/trace -- '"$root/build/tests/guests"' >&2; code=$?; cat /tmp/trace; exit $code'
if "$bin/shoal-lab" run --timeout 1800 --env SHOAL_SECCOMP=trace --env SHOAL_BIN_DIR="$bin" \
    --env SHOAL_IMAGES="$SHOAL_IMAGES" -- sh -c "$lab_run" > "$traces/lab" 2> "$traces/log"; then
    echo "policy-check: traced the Linux guests in the lab"
else
    failed="$failed lab"
    cat "$traces/log"
fi

rm "$traces/log"
"$bin/shoal-jailer" policy-report "$traces"/*
[ -z "$failed" ] || {
    echo "policy-check: failed while traced:$failed" >&2
    exit 1
}
