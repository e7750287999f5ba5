#!/usr/bin/env bash
# Trains with several processes of this machine, and starts them again from the last checkpoint when one is lost.
#
#   configs/launch/supervise.sh [-r RESTARTS] [-p PAUSE] N python -m train --config FILE.gin ...
#
# Each of the N processes gets its share of the machine's GPUs. Ends with 0 when the run is finished, with the code of a
# process that started again would fail in the same way (2, bad input; 1, training cannot go on), with 143 when it, or a
# process, was asked to stop, all of them having saved; and with the last code after RESTARTS (10) starts, PAUSE (5) seconds apart.
set -uo pipefail

restarts=10
pause=5
while getopts 'r:p:' option; do
  case $option in
    r) restarts=$OPTARG ;;
    p) pause=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "error: usage: $0 [-r RESTARTS] [-p PAUSE] N python -m train ..." >&2
  exit 2
fi
count=$1
shift

gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi -L | wc -l); fi
if ((gpus % count)); then
  echo "error: $count processes cannot share $gpus GPUs evenly" >&2
  exit 2
fi

stopping=''
pids=()
stop() {
  stopping=yes
  kill -TERM "${pids[@]}" 2>/dev/null
}
trap stop TERM INT

start() {
  local port share process
  if ((count > 1)); then
    port=$("$1" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  fi
  share=$((gpus / count))
  pids=()
  for ((process = 0; process < count; process++)); do
    local together=() place=()
    if ((count > 1)); then together=(--coordinator "127.0.0.1:$port" --processes "$count" --process "$process"); fi
    if ((gpus > 0)); then
      place=("CUDA_VISIBLE_DEVICES=$(seq -s, $((process * share)) $((process * share + share - 1)))")
    fi
    env "${place[@]}" "$@" "${together[@]}" &
    pids+=($!)
  done
}

# What the exit code of a process says, where it says something.
meaning() {
  case $1 in
    75) echo ': another one was lost' ;;
    134) echo ': ended by JAX, as it does when another one is lost' ;;
    143) echo ': asked to stop' ;;
    137) echo ': killed' ;;
  esac
}

# Waits for all; the worst code comes back in `code`. Once a process has failed, the others have half a minute.
await() {
  local left=("${pids[@]}") ended deadline=0 process index
  code=0
  while ((${#left[@]})); do
    local still=()
    for process in "${left[@]}"; do
      if kill -0 "$process" 2>/dev/null; then
        still+=("$process")
        continue
      fi
      wait "$process"
      ended=$?
      if ((ended != 0)); then
        for index in "${!pids[@]}"; do
          if ((pids[index] == process)); then echo "supervise: process $index ended with $ended$(meaning "$ended")" >&2; fi
        done
        # What its input or the training itself is to blame for counts most, then a wish to stop.
        case "$code/$ended" in
          */2 | */1) code=$ended ;;
          2/* | 1/*) ;;
          */143 | */130) code=143 ;;
          143/*) ;;
          *) code=$ended ;;
        esac
        if ((deadline == 0)); then deadline=$((SECONDS + 30)); fi
      fi
    done
    left=("${still[@]}")
    if ((deadline > 0 && SECONDS > deadline)) && [[ -z $stopping && ${#left[@]} -gt 0 ]]; then
      kill -KILL "${left[@]}" 2>/dev/null
    fi
    if ((${#left[@]})); then
      sleep 0.2 &
      wait $!
    fi
  done
}

for ((attempt = 0; ; attempt++)); do
  start "$@"
  await
  case $code in
    0 | 1 | 2 | 143) exit "$code" ;;
  esac
  if [[ -n $stopping ]]; then exit 143; fi
  if ((attempt >= restarts)); then
    echo "supervise: gave up after $restarts restarts" >&2
    exit "$code"
  fi
  echo "supervise: a process was lost; starting again in $pause s ($((attempt + 1)) of $restarts)" >&2
  sleep "$pause" &
  wait $!
  if [[ -n $stopping ]]; then exit 143; fi
done
