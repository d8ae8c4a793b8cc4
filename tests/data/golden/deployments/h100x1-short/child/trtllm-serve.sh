#!/bin/sh
# OpenAI-compatible server of TensorRT-LLM; llm_args.yaml wins over flags
# By puzzle-trtllm build; further arguments are passed on.
set -eu
ENGINE=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$ENGINE/launch/environment.sh"
exec trtllm-serve serve "$ENGINE/model" \
  --backend pytorch \
  --custom_module_dirs "$ENGINE/plugin/puzzle_trtllm_plugin" \
  --extra_llm_api_options "$ENGINE/llm_args.yaml" \
  "$@"
