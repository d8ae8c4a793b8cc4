#!/bin/sh
# OpenAI-compatible server of TensorRT-LLM; llm_args.yaml wins over flags
# By puzzle-trtllm build; further arguments are passed on.
set -eu
ENGINE=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
export TRTLLM_WINDOW_SIZE_SHARES=0.001220703125,0.998779296875
exec trtllm-serve serve "$ENGINE/model" \
  --backend pytorch \
  --extra_llm_api_options "$ENGINE/llm_args.yaml" \
  "$@"
