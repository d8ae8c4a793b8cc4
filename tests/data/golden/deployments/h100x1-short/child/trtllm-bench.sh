#!/bin/sh
# Throughput at scenario short: 4096 in, 4096 out
# By puzzle-trtllm build; further arguments are passed on.
set -eu
ENGINE=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$ENGINE/launch/environment.sh"
exec trtllm-bench --model openai/gpt-oss-120b --model_path "$ENGINE/model" \
  throughput \
  --backend pytorch \
  --custom_module_dirs "$ENGINE/plugin/puzzle_trtllm_plugin" \
  --extra_llm_api_options "$ENGINE/llm_args.yaml" \
  --tp 1 \
  --max_batch_size 95 --max_num_tokens 8192 \
  --dataset "$ENGINE/launch/bench-dataset.jsonl" \
  --concurrency 128 --streaming \
  "$@"
