#!/bin/sh
# Fetches and unpacks Debian's stock cloud kernel with its modules, for the lab and for tests. Nothing is installed.
#
#   scripts/cloud-kernel.sh [CACHE]
#
# Prints one line: the directory that holds boot/vmlinuz-* and lib/modules/*. CACHE is by default
# ${SHOAL_CACHE:-${XDG_CACHE_HOME:-~/.cache}/shoal}. SHOAL_CLOUD_KERNEL=DIR names a tree already unpacked.
# The tree is kept per version; the second time this takes milliseconds and needs no network, and it stays with the
# version that is there (remove the directory to take a newer one).
set -eu

if [ -n "${SHOAL_CLOUD_KERNEL:-}" ]; then
    [ -d "$SHOAL_CLOUD_KERNEL/lib/modules" ] || {
        echo "cloud-kernel.sh: SHOAL_CLOUD_KERNEL=$SHOAL_CLOUD_KERNEL holds no lib/modules" >&2
        exit 1
    }
    echo "$SHOAL_CLOUD_KERNEL"
    exit 0
fi

cache=${1:-${SHOAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/shoal}}
# The newest of those that are there. A tree gets its name only when it is complete, so a name is enough.
newest() { find "$cache" -maxdepth 1 -type d -name 'linux-image-*-cloud-amd64_*' 2>/dev/null | sort -V | tail -n 1; }
tree=$(newest)
if [ -n "$tree" ]; then
    echo "$tree"
    exit 0
fi

for tool in apt-get apt-cache dpkg; do
    command -v $tool >/dev/null 2>&1 || {
        echo "cloud-kernel.sh: needs Debian's $tool, which is not here; unpack a linux-image-*-cloud-amd64 package" >&2
        echo "cloud-kernel.sh: yourself and name its directory in SHOAL_CLOUD_KERNEL" >&2
        exit 1
    }
done
resolve() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '$1 == "Depends:" && /-cloud-amd64/ { print $2; exit }'; }
package=$(resolve)
if [ -z "$package" ] && [ "$(id -u)" = 0 ]; then
    echo "cloud-kernel.sh: apt knows no linux-image-cloud-amd64 yet, updating its lists" >&2
    apt-get -q update >&2
    package=$(resolve)
fi
[ -n "$package" ] || {
    echo "cloud-kernel.sh: apt knows no package linux-image-cloud-amd64; type: sudo apt-get update" >&2
    exit 1
}

mkdir -p "$cache"
# Two at once, as labs that are started side by side: the second waits, and downloads nothing.
exec 9> "$cache/cloud-kernel.lock"
flock 9
tree=$(newest)
if [ -n "$tree" ]; then
    echo "$tree"
    exit 0
fi
work=$(mktemp -d "$cache/.cloud-kernel.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
# As root, apt downloads as the user _apt, which cannot write into this directory: tell it to stay root.
sandbox=
[ "$(id -u)" = 0 ] && sandbox="-o APT::Sandbox::User=root"
echo "cloud-kernel.sh: downloading $package" >&2
# shellcheck disable=SC2086
(cd "$work" && apt-get -q $sandbox download "$package" >&2) || {
    echo "cloud-kernel.sh: could not download $package; when apt's lists are stale, type: sudo apt-get update" >&2
    exit 1
}
archive=$(find "$work" -maxdepth 1 -name '*.deb')
tree=$cache/$(basename "$archive" .deb | sed 's/%3a/:/')
dpkg -x "$archive" "$work/tree"
chmod 755 "$work/tree"
mv -T "$work/tree" "$tree"
echo "$tree"
