#!/bin/bash
# Builds every program and collects it in build/bin. Programs find each other by lying in one folder.
set -eu
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}/x86_64-unknown-linux-gnu

echo "build: the programs (cargo)"
# What people run unwinds on a panic; the VMM, the guest's init and what stands beside them in a comparison abort.
cargo build --quiet --release -p shoald -p shoal-cli -p shoal-images -p shoal-lab -p shoal-perf
cargo build --quiet --profile vmm -p shoal-vmm -p shoal-init -p shoal-jailer -p shoal-floor --bin shoal-floor \
    --bin shoal-vmm --bin shoal-init --bin shoal-jailer --bin shoal-escape

mkdir -p build/bin
copy() { # PROFILE PROGRAM…
    local profile=$1 program
    shift
    for program in "$@"; do
        # A new file under the old name: a program that runs keeps the old one.
        if ! cmp -s "$target/$profile/$program" "build/bin/$program"; then
            cp "$target/$profile/$program" "build/bin/.$program.new"
            mv "build/bin/.$program.new" "build/bin/$program"
        fi
    done
}
copy release shoald shoal shoal-images shoal-lab shoal-perf
copy vmm shoal-vmm shoal-init shoal-jailer shoal-escape shoal-floor
