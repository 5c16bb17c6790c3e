#!/bin/sh
# Finds out what this machine lacks to build, test and demonstrate Shoal, and puts it right.
#
#   scripts/deps.sh           install what is missing with apt when run as root; else print the one line to type
#   scripts/deps.sh --check   change nothing: print what is missing, exit 1 when something is
#   scripts/deps.sh --lint    as the first, and rustfmt and clippy must be there too
#   scripts/deps.sh --bench   as the first, and what `make bench` puts into its Linux guests: fio, iperf3
#
# Everything is looked for by the file or command that is used, not by the package's name, so a machine that has a
# tool from elsewhere is not asked for the package. When all is there this takes a few milliseconds.
set -eu

RUST_WANTED=1.95
check_only=false
lint=false
bench=false
for argument in "$@"; do
    case $argument in
        --check) check_only=true ;;
        --lint) lint=true ;;
        --bench) bench=true ;;
        *) echo "deps.sh: unknown argument '$argument' (known: --check, --lint, --bench)" >&2; exit 2 ;;
    esac
done

missing=
# need_command PACKAGE COMMAND, need_file PACKAGE FILE: remember PACKAGE when the thing is not there.
need_command() { PATH="$PATH:/usr/sbin:/sbin" command -v "$2" >/dev/null 2>&1 || missing="$missing $1"; }
need_file() { [ -e "$2" ] || missing="$missing $1"; }

# Rust's linker and bundled SQLite; the probe guest; the kernel.
need_command gcc gcc
# libFuzzer, which the fuzz targets are linked with.
need_command g++ g++
need_command make make
need_file libc6-dev /usr/include/stdio.h
# The guest kernel only. objtool, which checks the kernel's code, reads ELF with libelf.
need_command flex flex
need_command bison bison
need_command bc bc
need_command xz-utils xz
need_file libelf-dev /usr/include/gelf.h
need_file linux-source-6.1 /usr/src/linux-source-6.1.tar.xz
# Root file systems and initramfs archives. The packages busybox and busybox-static own the same file: the guest has
# no libraries, so only a static one will do, and that one names no dynamic loader.
need_command erofs-utils mkfs.erofs
need_command cpio cpio
if [ ! -x /bin/busybox ] || head -c 4096 /bin/busybox | grep -q ld-linux; then missing="$missing busybox-static"; fi
# The lab, and tests of networks.
need_command qemu-system-x86 qemu-system-x86_64
need_command iproute2 ip
need_command kmod depmod
if $bench; then
    need_command fio fio
    need_command iperf3 iperf3
fi

# Debian 12's qemu-system-x86 refuses to live beside a newer qemu-utils (from backports, for one): take both alike.
pin_qemu_utils() {
    case " $missing " in *" qemu-system-x86 "*) ;; *) return 0 ;; esac
    installed=$(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null) || return 0
    candidate=$(apt-cache policy qemu-system-x86 2>/dev/null | awk '$1 == "Candidate:" { print $2 }')
    [ -n "$installed" ] && [ -n "$candidate" ] && [ "$candidate" != "(none)" ] || return 0
    if dpkg --compare-versions "$installed" gt "$candidate"; then
        missing="$missing qemu-utils=$candidate --allow-downgrades"
    fi
}

install_with_apt() {
    echo "deps.sh: installing with apt:$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update || echo "deps.sh: 'apt-get update' failed; trying with the package lists that are there" >&2
    pin_qemu_utils
    # $missing is a list of words by intent.
    # shellcheck disable=SC2086
    if ! apt-get -q install -y --no-install-recommends $missing; then
        echo "deps.sh: apt could not install:$missing. Its message is above; the usual causes are no network, or" >&2
        echo "deps.sh: package sources without Debian 12's 'main'." >&2
        exit 1
    fi
}

if [ -n "$missing" ]; then
    if $check_only; then
        echo "missing packages:$missing"
    elif ! command -v apt-get >/dev/null 2>&1; then
        echo "deps.sh: there is no apt here; install what these Debian packages hold, then come back:$missing" >&2
        exit 1
    elif [ "$(id -u)" = 0 ]; then
        install_with_apt
        missing=
    else
        pin_qemu_utils
        echo "deps.sh: some packages are missing. As you are not root, please type this line, then come back:" >&2
        echo "  sudo apt-get update && sudo apt-get install -y --no-install-recommends$missing" >&2
        exit 1
    fi
fi

# Rust comes from rustup: no release of Debian has packaged one new enough for this project so far.
rust_problem() {
    if ! command -v cargo >/dev/null 2>&1; then
        if [ -x "$HOME/.cargo/bin/cargo" ]; then
            echo "cargo is in ~/.cargo/bin but not on PATH; type: . ~/.cargo/env"
        else
            echo "Rust is missing; install Rust >= $RUST_WANTED with rustup (Debian 12 packages none that new)"
        fi
        return
    fi
    have=$(cargo --version 2>&1 | awk '$1 == "cargo" { print $2; exit }')
    oldest=$(printf '%s\n%s\n' "$RUST_WANTED" "${have:-0}" | sort -V | head -n 1)
    if [ "$oldest" != "$RUST_WANTED" ]; then
        echo "cargo is ${have:-not working}, but >= $RUST_WANTED is needed; type: rustup update stable && rustup default stable"
        return
    fi
    $lint || return 0
    command -v rustfmt >/dev/null 2>&1 && rustfmt --version >/dev/null 2>&1 &&
        cargo clippy --version >/dev/null 2>&1 && return
    echo "rustfmt or clippy is missing; type: rustup component add rustfmt clippy"
}
problem=$(rust_problem)
if [ -n "$problem" ]; then echo "deps.sh: $problem" >&2; exit 1; fi
[ -z "$missing" ]
