#!/bin/sh
# Triton: gRPC 8001, HTTP 8000, metrics 8002, on this machine only (--host 0.0.0.0 opens them)
# By puzzle-trtllm build; further arguments are passed on.
set -eu
ENGINE=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$ENGINE/launch/environment.sh"
exec python3 -m puzzle_trtllm serve "$ENGINE" \
  "$@"
