"""Do two engines say the same? Greedy tokens and first-token log-probabilities, recorded on each, then compared.

    python -m puzzle_trtllm.serve.acceptance slice CHECKPOINT OUT     a few real layers, where the whole is too large
    python -m puzzle_trtllm.serve.acceptance record ENGINE a.json     one file an engine, on the machine that runs it
    python -m puzzle_trtllm.serve.acceptance compare a.json b.json    no engine needed

Written against the LLM API, so TensorRT-LLM and the reference runtime answer the same questions: TensorRT-LLM against
the reference, FP8 KV folded against unfolded against BF16, one GPU against TP8 against DEP8. Rounding differs between
kernels, so greedy texts part sooner or later; what must agree is where they start. The first token's log-probability
is one number of the logits, taken before any texts can have parted.
"""
