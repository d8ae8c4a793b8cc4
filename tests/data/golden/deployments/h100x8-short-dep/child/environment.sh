# env_overrides of llm_args.yaml, for ranks that are started from outside. By puzzle-trtllm build.
export TRTLLM_WINDOW_SIZE_SHARES=0.5,0.5
