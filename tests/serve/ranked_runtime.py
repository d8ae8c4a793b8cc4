"""The scripted runtime under MPI, as TensorRT-LLM's LLM is there: rank 0 works in a thread, the others by the session.

Each rank reports who it is and what it sees; the answer to `ranks` is that report instead of an echo.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import scripted_runtime
from scripted_runtime import KvCacheConfig, SamplingParams

__all__ = ["LLM", "KvCacheConfig", "SamplingParams"]


class MpiCommSession:
    """What the real one of that name does with a communicator whose ranks wait in MPICommExecutor."""

    def __init__(self, comm: Any, n_workers: int) -> None:
        from mpi4py.futures import MPICommExecutor

        assert comm.Get_rank() == 0 and comm.Get_size() == n_workers
        self._n_workers = n_workers
        self._own = ThreadPoolExecutor(1)
        self._context = MPICommExecutor(comm)
        self._pool = self._context.__enter__()

    def submit_sync(self, task: Any) -> list[Any]:
        futures = [self._own.submit(task), *(self._pool.submit(task) for _ in range(self._n_workers - 1))]
        return [future.result() for future in futures]

    def shutdown(self) -> None:
        self._own.shutdown()
        self._context.__exit__(None, None, None)


def report() -> str:
    import puzzle_trtllm_plugin
    from mpi4py.MPI import COMM_WORLD

    return f"{COMM_WORLD.Get_rank()}:{os.environ['TRTLLM_WINDOW_SIZE_SHARES']}:{puzzle_trtllm_plugin.NAME}"


class LLM(scripted_runtime.LLM):
    def __init__(self, model: str, _mpi_session: Any = None, **arguments: Any) -> None:
        super().__init__(model, **arguments)
        self._session = _mpi_session
        self._report = "alone" if _mpi_session is None else " ".join(sorted(_mpi_session.submit_sync(report)))

    def generate_async(self, inputs: Any, sampling_params: Any, streaming: bool = False) -> Any:
        if inputs == "ranks":
            inputs, sampling_params.max_tokens = self._report, len(self._report)
        return super().generate_async(inputs, sampling_params, streaming)

    def shutdown(self) -> None:
        super().shutdown()
        if self._session is not None:
            self._session.shutdown()
