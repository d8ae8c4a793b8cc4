"""Ranks started by torchrun, on one host or several, instead of by the engine.

    torchrun --nproc-per-node 2 -m puzzle_trtllm.serve.runtimes.reference.torchrun SCRIPT.py [ARGUMENTS]
    torchrun --nproc-per-node 2 -m puzzle_trtllm.serve.runtimes.reference.torchrun -m MODULE [ARGUMENTS]

Rank 0 runs the script; the engine of its `LLM(..., tensor_parallel_size=2)` leads, and the other ranks follow it until
it is shut down. One LLM a launch: the other ranks have ended then.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys

from puzzle_trtllm.errors import EngineError


def main(arguments: list[str]) -> None:
    """Raises EngineError outside torchrun, or without a script."""
    if "RANK" not in os.environ:
        raise EngineError("not started by torchrun", key="RANK", found="no such variable in the environment")
    if not arguments or arguments == ["-m"]:
        raise EngineError("nothing to run", expected="SCRIPT.py or -m MODULE, with its arguments")
    if os.environ["RANK"] == "0":
        _run(arguments)
        return
    from puzzle_trtllm.serve.runtimes.reference.engine_process import LOG_FORMAT, follow

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
    follow()


def _run(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EngineError as error:
        sys.exit(f"error: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ["RANK"] != "0":
        os._exit(0)  # tearing down torch.distributed takes longer than there is reason to wait
