#!/bin/bash
# Builds what the Linux-guest tests (host/tests/guests) need beside the images of scripts/images.sh:
#   build/images/test/rootfs.erofs        the image's root file system with the tests' own program in it
#   build/images/stock/vmlinuz, initramfs.cpio.gz
#                                         Debian's cloud kernel, its modules for virtio-mmio guests, and shoal-init
set -eu
cd "$(dirname "$0")/.."
bin=build/bin
images=build/images
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cargo build --quiet --release -p shoal-host --example guest-work
program=${CARGO_TARGET_DIR:-target}/x86_64-unknown-linux-gnu/release/examples/guest-work
strip -o "$work/guest-work" "$program"
mkdir -p "$images/test" "$images/stock"
"$bin/shoal-images" rootfs --out "$images/test/rootfs.erofs" --file "$work/guest-work:/bin/guest-work"

tree=$(scripts/cloud-kernel.sh)
seen=" "
files=()
# Adds a module after those that it needs. Names of files have '-' or '_' where those of modules have '_'.
add() {
    local path needed
    case $seen in *" $1 "*) return 0 ;; esac
    seen="$seen$1 "
    path=$(find "$tree/lib/modules" -name "${1//[-_]/[-_]}.ko" | head -n 1)
    [ -n "$path" ] || return 0 # built into the kernel
    for needed in $(/sbin/modinfo -F depends "$path" | tr , ' '); do add "$needed"; done
    echo "$1.ko" >> "$work/order"
    files+=(--file "$path:/lib/modules/$1.ko")
}
for module in virtio_mmio virtio_blk virtio_net virtio_rng vmw_vsock_virtio_transport button evdev; do
    add "$module"
done
for module in virtio_mmio virtio_blk vmw_vsock_virtio_transport; do
    grep -qx "$module.ko" "$work/order" || {
        echo "test-images.sh: $module.ko is not below $tree/lib/modules" >&2
        exit 1
    }
done
"$bin/shoal-images" initramfs --out "$images/stock/initramfs.cpio.gz" --init host/tests/guests/stock-init.sh \
    --file "$bin/shoal-init:/sbin/shoal-init" --file "$work/guest-work:/bin/guest-work" \
    --file "$work/order:/lib/modules/order" "${files[@]}"
cp "$tree"/boot/vmlinuz-* "$images/stock/vmlinuz"
