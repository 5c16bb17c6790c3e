#!/bin/bash
# Are the seccomp policies minimal? Runs tests that start guests with every system call of their VMMs counted, from where the
# filter of production would begin, and fails when a policy allows one that no run used, or lacks one that a run needed.
#     scripts/policy-check.sh          in the lab, the tests that use every line of the policies (a part of `make test`)
#     scripts/policy-check.sh --all    all tests that start guests, in the lab and here: for deriving a policy
# `make build`, and the tests' programs and images (scripts/test-images.sh, scripts/build-tests.sh), come first.
set -eu -o pipefail
cd "$(dirname "$0")/.."
root=$PWD
bin=$root/build/bin
export SHOAL_BIN_DIR=$bin SHOAL_IMAGES=$root/build/images SHOAL_SECCOMP=trace
traces=$(mktemp -d)
trap 'rm -rf "$traces"' EXIT
failed=

# A line that one of these no longer uses is reported as unused: add the test that does.
tests=(block::what_is_flushed_survives_a_reset block::what_is_discarded_is_given_back
    engines::what_is_flushed_through_io_uring_survives_a_reset engines::a_limit_that_is_set_on_a_running_guest_is_kept
    engines::tcp_through_a_tap_with_two_queues hostile::rubbish_ends_nothing_and_spins_nothing net::tcp_through_a_tap_both_ways
    stop::each_end_of_a_bare_metal_guest_has_its_reason stop::is_killed_at_the_deadline vsock::sockets_both_ways)
case ${1:-} in
    --all) tests=() ;;
    "") ;;
    *)
        sed -n '2,6s/^# \?//p' "$0" >&2
        exit 2
        ;;
esac

# One line of what passed or what failed; the whole output only when it did.
traced() { # NAME COMMAND…
    local name=$1
    shift
    if "$@" > "$traces/log" 2>&1; then
        echo "policy-check: traced $name"
    else
        failed="$failed, $name"
        cat "$traces/log"
    fi
}

# With a clock that cannot be read without the kernel, as some hosts have.
in_lab='echo acpi_pm > /sys/devices/system/clocksource/clocksource0/current_clocksource
    shoal-jailer trace --output /tmp/trace -- "$@" >&2; code=$?; cat /tmp/trace; exit $code'
lab() {
    "$bin/shoal-lab" run --timeout 1800 --env SHOAL_SECCOMP=trace --env SHOAL_BIN_DIR="$bin" \
        --env SHOAL_IMAGES="$SHOAL_IMAGES" -- sh -c "$in_lab" sh "$root/build/tests/guests" --exact "${tests[@]}" \
        > "$traces/lab"
}
traced "Linux guests in the lab" lab

here() { # DIRECTORY PROGRAM
    cd "$1" && "$bin/shoal-jailer" trace --output "$traces/${2##*/}" -- "$2"
}
if [ ${#tests[@]} -eq 0 ] && [ -r /dev/kvm ] && [ -w /dev/kvm ]; then
    for package in api-server:shoald cli:shoal-cli host:shoal-host; do
        # cargo names each program by a hash; its messages tell where it lies.
        cargo test --quiet --release --no-run -p "${package#*:}" --test '*' --message-format=json |
            sed -n 's/.*"kind":\["test"\].*"name":"\([^"]*\)".*"executable":"\([^"]*\)".*/\1 \2/p' > "$traces/programs"
        while read -r name program; do
            traced "${package#*:}'s $name on this machine" here "$root/${package%%:*}" "$program"
        done < "$traces/programs"
        rm "$traces/programs"
    done
fi

rm "$traces/log"
"$bin/shoal-jailer" policy-report "$traces"/* || failed="$failed, the report"
[ -z "$failed" ] || {
    echo "policy-check: failed:${failed#,}" >&2
    exit 1
}
