#!/bin/bash
# Builds the tests that run in the lab and collects them in build/tests, under their own names, with what they start in
# build/examples.
set -eu -o pipefail
cd "$(dirname "$0")/.."

collect() { # NAME FILE: a new file under the old name, as a program that runs keeps the old one
    mkdir -p "$(dirname "$1")"
    cmp -s "$2" "$1" || {
        cp "$2" "$1.new"
        mv "$1.new" "$1"
    }
}

# cargo names each program by a hash; its messages tell where it lies.
cargo test --quiet --release --no-run -p shoal-host --test guests --test jail --message-format=json |
    sed -n 's/.*"target":{"kind":\["test"\].*"name":"\([^"]*\)".*"executable":"\([^"]*\)".*/\1 \2/p' |
    while read -r name program; do collect "build/tests/$name" "$program"; done
cargo build --quiet --release -p shoal-host --example forbidden-vmm
target=${CARGO_TARGET_DIR:-target}/x86_64-unknown-linux-gnu
collect build/examples/forbidden-vmm "$target/release/examples/forbidden-vmm"
for program in build/tests/guests build/tests/jail; do
    [ -x "$program" ] || {
        echo "build-tests.sh: cargo named no test program for $program" >&2
        exit 1
    }
done
