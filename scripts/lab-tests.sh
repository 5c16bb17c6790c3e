#!/bin/bash
# The tests of guests (host/tests) in the lab, in their jails and under the filters of production:
#     scripts/lab-tests.sh root    as root, each guest with a user and a cgroup of its own
#     scripts/lab-tests.sh user    as an ordinary user in the group kvm, with a cgroup delegated to it
# Words that follow are for the test programs, such as a filter. `make build images`, scripts/test-images.sh and
# scripts/build-tests.sh come first.
set -eu -o pipefail
cd "$(dirname "$0")/.."
lab=build/bin/shoal-lab
programs=("$PWD/build/tests/jail" "$PWD/build/tests/guests")
who=${1:-}
[ $# -eq 0 ] || shift

case $who in
    root) exec "$lab" test --timeout 1200 "${programs[@]}" -- "$@" ;;
    user)
        script=$PWD/host/tests/guests/ordinary-user.sh
        "$lab" run --timeout 1200 --copy "$script" -- sh "$script" "${programs[@]}" -- "$@"
        ;;
    *)
        sed -n '2,6s/^# \?//p' "$0" >&2
        exit 2
        ;;
esac
