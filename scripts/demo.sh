#!/bin/bash
# Boots Shoal's own guest under Shoal's own VMM, over HTTP on a Unix socket: here when this machine's KVM can run Linux,
# else in the lab.
set -eu
cd "$(dirname "$0")/.."
bin=$PWD/build/bin

set +e
"$bin/shoal" doctor > build/doctor.txt 2>&1
verdict=$?
set -e
if [ "$verdict" = 0 ]; then
    exec "$PWD/scripts/demo-guest.sh" "$bin"
fi
echo "demo: this machine's KVM cannot run Linux guests (build/bin/shoal doctor says why); the demo runs in the lab instead, a machine emulated in software"
mkdir -p build/scripts
cp scripts/demo-guest.sh build/scripts/
exec "$bin/shoal-lab" run --timeout 300 -- "$PWD/build/scripts/demo-guest.sh" "$bin"
