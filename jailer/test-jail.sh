#!/bin/sh
# Tries to get out of the jail: `test-jail.sh SHOAL_ESCAPE [UID]`.
#
# As root: from a jail made by root, then from one made by the ordinary user UID (default 61234), each with a cgroup
# delegated to it where version 2 is mounted. As an ordinary user: from a rootless jail only. Prints one line per
# attempt, "what: refused by layer", and closes each run with "N passed, N failed". Fails when an attempt got through.
set -eu

escape=${1:?give the path of shoal-escape}
if [ "$(id -u)" = 0 ]; then
    exec "$escape" suite ${2:+"$2"}
else
    exec "$escape" drive
fi
