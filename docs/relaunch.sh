#!/bin/bash
# relaunch.sh COMMAND...: starts the command again until it ends well. One on each node, around the launcher.
#
# SIGTERM and Ctrl-C are handed on to the command as SIGTERM; training saves, and nothing is started again: 143 or 130.
# RELAUNCH_MAX failures in a row (10), each within RELAUNCH_SOON seconds of its start (300), are too many: the last
# status. RELAUNCH_WAIT seconds (5) lie between two starts.
set -u
failures=0 stopped=0 child=

stop() {
    stopped=$1
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; fi
}
trap 'stop 143' TERM
trap 'stop 130' INT

run() { # in the background, so that signals are seen at once
    "$@" &
    child=$!
    while :; do
        wait "$child"
        status=$?
        kill -0 "$child" 2>/dev/null || break # otherwise it was the signal that ended `wait`
    done
    child=
}

while [ "$stopped" = 0 ]; do
    began=$SECONDS
    run "$@"
    if [ "$status" = 0 ]; then exit 0; fi
    if [ "$stopped" != 0 ]; then break; fi
    if [ $((SECONDS - began)) -lt "${RELAUNCH_SOON:-300}" ]; then failures=$((failures + 1)); else failures=1; fi
    if [ "$failures" -ge "${RELAUNCH_MAX:-10}" ]; then
        echo "relaunch: ended with $status, $failures times in a row: given up." >&2
        exit "$status"
    fi
    echo "relaunch: ended with $status; again in ${RELAUNCH_WAIT:-5} s." >&2
    run sleep "${RELAUNCH_WAIT:-5}"
done
exit "$stopped"
