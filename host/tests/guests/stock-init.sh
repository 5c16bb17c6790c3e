#!/bin/sh
# PID 1 of the test guest with Debian's stock kernel: loads what that kernel has as modules, then becomes shoal-init.
# Reads the list that scripts/test-images.sh wrote, in which each module stands behind those that it needs.
/bin/busybox mount -t proc proc /proc
while read -r module; do
    /bin/busybox insmod "/lib/modules/$module" || echo "stock-init: $module cannot be loaded"
done < /lib/modules/order
exec /sbin/shoal-init
