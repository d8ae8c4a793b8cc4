# env_overrides of llm_args.yaml, for ranks that are started from outside. By puzzle-trtllm build.
export TRTLLM_WINDOW_SIZE_SHARES=0.002197265625,0.0478515625,0.949951171875
