#!/bin/bash
# Builds guests into build/images: Shoal's own image and the probe guests; with --reference also the reference kernel and
# initramfs of the boot figures (another kernel to compile, the first time).
set -eu
cd "$(dirname "$0")/.."
images=build/bin/shoal-images
out=build/images

if [ "${1:-}" != --reference ]; then
    exec "$images" build --out "$out"
fi
# Both kernels at once: unpacking, linking and compressing take one processor each.
log=build/reference-kernel.txt
echo "kernel: the reference kernel is built meanwhile; see $log"
set -m # a process group of its own: to be ended with the compilers that it has started
"$images" kernel --reference --out "$out/reference" > "$log" 2>&1 &
reference=$!
set +m
trap 'kill -- "-$reference" 2> /dev/null || true' EXIT
"$images" build --out "$out"
if ! wait "$reference"; then
    cat "$log" >&2
    exit 1
fi
trap - EXIT
"$images" initramfs --reference --out "$out/reference/initramfs.gz"
