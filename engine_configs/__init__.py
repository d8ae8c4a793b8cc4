"""Engine configs: one YAML file a deployment, holding only what a human decides.

A bare name given to `puzzle-trtllm build --config NAME` is looked up here. The keys are those of
`puzzle_trtllm.engine.EngineConfig`; everything else in `llm_args.yaml` is derived by `build` (`build --explain` shows
each derived value with its reason).
"""
