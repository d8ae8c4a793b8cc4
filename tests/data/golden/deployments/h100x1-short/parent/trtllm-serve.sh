#!/bin/sh
# OpenAI-compatible server of TensorRT-LLM; llm_args.yaml wins over flags
# By puzzle-trtllm build; further arguments are passed on.
set -eu
ENGINE=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$ENGINE/launch/environment.sh"
exec trtllm-serve serve "$ENGINE/model" \
  --backend pytorch \
  --extra_llm_api_options "$ENGINE/llm_args.yaml" \
  "$@"
