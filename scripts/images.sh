#!/bin/bash
# Builds guests into build/images: Shoal's own image and the probe guests; with --reference also the reference kernel and
# initramfs of the boot figures (another kernel to compile, the first time).
set -eu
cd "$(dirname "$0")/.."
images=build/bin/shoal-images
out=build/images

"$images" build --out "$out"
if [ "${1:-}" = --reference ]; then
    "$images" kernel --reference --out "$out/reference"
    "$images" initramfs --reference --out "$out/reference/initramfs.gz"
fi
