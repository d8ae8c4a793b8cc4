# env_overrides of llm_args.yaml, for ranks that are started from outside. By puzzle-trtllm build.
export TRTLLM_WINDOW_SIZE_SHARES=0.01904296875,0.98095703125
