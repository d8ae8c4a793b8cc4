#!/bin/sh
# Throughput at scenario long-node: 65536 in, 65536 out
# By puzzle-trtllm build; further arguments are passed on.
set -eu
ENGINE=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
. "$ENGINE/launch/environment.sh"
exec trtllm-bench --model openai/gpt-oss-120b --model_path "$ENGINE/model" \
  throughput \
  --backend pytorch \
  --extra_llm_api_options "$ENGINE/llm_args.yaml" \
  --tp 8 --ep 8 \
  --max_batch_size 22 --max_num_tokens 8192 \
  --dataset "$ENGINE/launch/bench-dataset.jsonl" \
  --concurrency 128 --streaming \
  "$@"
