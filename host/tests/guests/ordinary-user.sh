#!/bin/sh
# Runs test programs in the lab, one after another, as an ordinary user who has been given what docs/security.md asks for:
# /dev/kvm by its group, a TAP, and for each program a cgroup of version 2 with its controllers, in which it is alone (as
# systemd does with User= and Delegate=yes).
#     ordinary-user.sh PROGRAM… [-- ARGUMENT…]
set -eu
user=1000
echo "shoal:x:$user:$user::/tmp:/bin/sh" >> /etc/passwd
echo "shoal:x:$user:" >> /etc/group
sed -i 's/^kvm:.*/&shoal/' /etc/group
chgrp kvm /dev/kvm
chmod 0660 /dev/kvm

chmod 0666 /dev/net/tun
export SHOAL_TAP=shoal-given
# Busybox cannot name an owner; one without any is everybody's.
tunctl -t "$SHOAL_TAP" > /dev/null
ip addr add 198.51.100.1/24 dev "$SHOAL_TAP"
ip link set "$SHOAL_TAP" up

programs=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    programs="$programs $1"
    shift
done
[ $# -eq 0 ] || shift

failed=0
for program in $programs; do
    unit=/sys/fs/cgroup/shoald-${program##*/}.service
    mkdir "$unit"
    for file in "$unit" "$unit/cgroup.procs" "$unit/cgroup.subtree_control" "$unit/cgroup.threads"; do
        chown "$user:$user" "$file"
    done
    # The shell's own number: `exec` keeps it, so that no other process is in the cgroup.
    sh -c "echo 0 > $unit/cgroup.procs; exec su shoal -c 'exec $program --show-output $*'" 2>&1 || failed=1
done
exit $failed
