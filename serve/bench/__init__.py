"""The load generator: hold a load on a server, measure it, and compare servers fairly.

load.py          a closed loop of streaming requests, each recorded token by token
prompts.py       random prompts of an exact length
runner.py        `run_bench`: one scenario against one server -> BenchResult
interleaved.py   `run_interleaved`: several servers that are up together, measured in turn
result.py        BenchResult and InterleavedResult, as JSON and as a table
progress.py      the live line on stderr
"""
