#!/bin/bash
# Tries to break out of the jail: here (jails of root and rootless ones as root, rootless ones as an ordinary user), and in
# the lab, where the kernel has cgroup version 2 with all controllers. One line for each attempt, and at the end the sum.
set -eu -o pipefail
cd "$(dirname "$0")/.."
escape=$PWD/build/bin/shoal-escape
log=$(mktemp)
trap 'rm -f "$log"' EXIT
code=0

echo "== jails of this machine"
jailer/test-jail.sh "$escape" 2>&1 | tee -a "$log" || code=1
echo "== jails of the lab"
if ! command -v qemu-system-x86_64 > /dev/null; then
    echo "SKIP: the lab's jails: qemu-system-x86_64 is not installed"
else
    scripts/cloud-kernel.sh > /dev/null
    build/bin/shoal-lab run --copy "$escape" -- "$escape" suite 2>&1 | tee -a "$log" || code=1
fi
echo "== all jails"
awk '/^[0-9]+ passed, [0-9]+ failed/ { passed += $1; failed += $3; skipped += $5 }
    END { print passed + 0 " passed, " failed + 0 " failed" (skipped ? ", " skipped " skipped" : "") }' "$log"
exit $code
