"""The load generator: hold a load on a server, measure it, and compare servers fairly.

load.py          a closed loop of streaming requests, each recorded token by token
open_loop.py     requests that arrive at a rate, whatever the server does
workers.py       either of them from several processes, so that the client is never the limit
prompts.py       random prompts of an exact length
replay.py        the requests and moments of a trace
token_counts.py  tokens of a server that tells no counts
runner.py        `run_bench`, `run_open_loop`: one scenario against one server -> BenchResult, OpenLoopResult
interleaved.py   `run_interleaved`: several servers that are up together, measured in turn
sweep.py         `run_sweep`: one scenario at several concurrencies, the knee, CSV; goes on where it broke off
measure.py       what both do: connect, warm up, drive, count
requests_csv.py  a row a request
result.py        BenchResult, OpenLoopResult and InterleavedResult, as JSON and as a table
progress.py      the live line on stderr
"""
