#!/bin/sh
# The demonstration itself: a daemon, a guest that does something and powers off, and one that idles. Needs nothing but
# a POSIX shell (in the lab, busybox's). Usage: demo-guest.sh FOLDER-OF-THE-PROGRAMS
set -eu
PATH=$1:$PATH
dir=$(mktemp -d)
SHOAL_SOCKET=$dir/shoal.sock
export SHOAL_SOCKET
daemon= follower=
clean_up() {
    [ -z "$follower" ] || kill "$follower" 2> /dev/null || true
    if [ -n "$daemon" ]; then
        kill "$daemon" 2> /dev/null || true
        wait "$daemon" 2> /dev/null || true
    fi
    rm -rf "$dir"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

if [ -t 1 ]; then bold='\033[1m' plain='\033[0m'; else bold='' plain=''; fi
say() { printf "\n$bold%s$plain\n" "$*"; }
# Reads lines from standard input until one holds $1.
wait_for() {
    while read -r line; do
        case $line in *"$1"*) return 0 ;; esac
    done
    echo "demo: '$1' was not seen" >&2
    return 1
}

say "shoald --socket shoal.sock --state state"
mkfifo "$dir/log"
shoald --socket "$SHOAL_SOCKET" --state "$dir/state" --stop-guests-on-exit 2> "$dir/log" &
daemon=$!
exec 3< "$dir/log"
wait_for ready <&3
# The daemon's log must keep being read, or it would block.
cat <&3 > "$dir/daemon.log" &

say "shoal run --timeline -- sh -c '…'      # console of a guest that works and powers off"
shoal run --timeline -- sh -c 'echo hello from $(uname -srm) on $(nproc) vCPU; free -m; ls /'

say "shoal run --detach --name idle -- sleep 600      # and what an idle guest costs"
shoal run --detach --name idle -- sleep 600 > /dev/null
mkfifo "$dir/console"
shoal logs -f idle > "$dir/console" &
follower=$!
wait_for "shoal-init: ready" < "$dir/console"
shoal show idle

say "shoal stop idle && shoal rm idle"
shoal stop idle
shoal rm idle
