"""How abacus was made: `python -m puzzle_trtllm.demo.training OUT [--seed N]` trains it again from nothing.

`vocabulary` and `dimensions` say what the model is; `model` computes it, with `layers`, `attention` and `mixture`;
`rounding` imitates its stored precision. `data` draws examples, `schedule` says what happens at which step, `optimizer`
and `train` do it. `checkpoint` writes and reads the released format, `heldout` the data beside it. `generate` decodes,
`pruning` compares ways to choose experts, `evaluate` measures all of it.
"""
