#!/bin/bash
# Builds the tests that run in the lab and collects them in build/tests, under their own names.
set -eu -o pipefail
cd "$(dirname "$0")/.."

# cargo names each program by a hash; its messages tell where it lies.
program=$(cargo test --quiet --release --no-run -p shoal-host --test guests --message-format=json |
    sed -n 's/.*"target":{[^}]*"name":"guests".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
[ -n "$program" ] || {
    echo "build-tests.sh: cargo named no test program 'guests'" >&2
    exit 1
}
mkdir -p build/tests
cmp -s "$program" build/tests/guests || {
    cp "$program" build/tests/.guests.new
    mv build/tests/.guests.new build/tests/guests
}
