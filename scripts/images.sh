#!/bin/bash
# Builds the guests into build/images: Shoal's own image, the probe guests, and the reference guest of the boot figures.
set -eu
cd "$(dirname "$0")/.."
bin=build/bin
out=build/images

"$bin/shoal-images" build --out "$out"
# Names that a program looks for, beside the image's own.
"$bin/shoal-images" kernel --reference --out "$out/reference"
"$bin/shoal-images" initramfs --reference --out "$out/reference/initramfs.gz"
