"""Decode steps replayed as CUDA graphs: on a GPU the launches of a step cost more than its arithmetic.

A graph repeats recorded launches on the same addresses, so a step is copied into buffers that stay: one set for each
batch size that was recorded, block tables as wide as the longest sequence. A smaller batch is padded by repeating its
last row, which computes and writes the same values once more and disturbs nobody. Steps with prompt chunks run as
usual.

Legend: S rows of a recorded batch, K KV heads, M blocks of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from puzzle_trtllm.models.reference.kv_cache import PagedKvCache, SequenceBlocks
from puzzle_trtllm.models.reference.model import ReferenceModel
from puzzle_trtllm.models.reference.step import SequenceStep, Step, plan_step

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Takes a computation on fixed buffers; gives what repeats it, and the tensor that every repetition overwrites."""


def default_batch_sizes(max_batch_size: int) -> list[int]:
    """1, 2, 4, then every 8 up to 128, then powers of two, as TensorRT-LLM's `cuda_graph_config` has them; and the
    largest."""
    sizes = [1, 2, 4, *range(8, 129, 8), *(1 << power for power in range(8, max_batch_size.bit_length()))]
    return [size for size in sizes if size < max_batch_size] + [max_batch_size]


class DecodeGraphs:
    """Runs steps of a model over one cache, pure decode steps from recordings of up to the largest batch size."""

    def __init__(
        self, model: ReferenceModel, cache: PagedKvCache, *, batch_sizes: Sequence[int], record: Record
    ) -> None:
        self._model = model
        self._cache = cache
        # The largest first: the memory of a recording is reused by the smaller ones.
        sizes = sorted(set(batch_sizes), reverse=True)
        self._recorded = [_RecordedBatch(model, cache, size, record) for size in sizes][::-1]

    def forward(self, step: Step, cache: PagedKvCache) -> Tensor:
        """As `ReferenceModel.forward`, for the cache given before. The next replay overwrites these logits."""
        assert cache is self._cache
        rows = len(step.token_ids)
        if step.num_decodes == rows == len(step.logit_rows):
            for recorded in self._recorded:
                if rows <= recorded.size:
                    return recorded.replay(step)
        return self._model.forward(step, cache)


class _RecordedBatch:
    def __init__(self, model: ReferenceModel, cache: PagedKvCache, size: int, record: Record) -> None:
        longest = {w: SequenceBlocks(blocks=[0] * count) for w, count in cache.demand(model.max_seq_len).items()}
        row = SequenceStep(tokens=[0], start=1, blocks=longest, wants_logits=True)

        def compute() -> Tensor:
            logits = model.forward(self._step, cache)
            for own in self._step.groups.values():
                if own.decode is not None:
                    own.decode.derived.clear()  # what kernels keep beside a step is computed anew in every one
            return logits

        self.size = size
        self._step = plan_step([row] * size, cache)
        """The buffers. Recording computes on token 1 of block 0 of every pool, which nobody holds yet."""
        self._repeat, self._logits = record(compute)

    def replay(self, step: Step) -> Tensor:
        """Logits float32 `[rows of the step, V]`."""
        _fill(self._step.token_ids, step.token_ids)
        _fill(self._step.positions, step.positions)
        for window, own in self._step.groups.items():
            group = step.groups[window]
            assert own.decode is not None and group.decode is not None
            _fill(own.write_rows, group.write_rows)
            _fill(own.write_offsets, group.write_offsets)
            _fill(own.decode.blocks[:, : group.decode.blocks.shape[1]], group.decode.blocks)
            _fill(own.decode.first_keys, group.decode.first_keys)
            _fill(own.decode.positions, group.decode.positions)
        self._repeat()
        return self._logits[: len(step.token_ids)]


def _fill(buffer: Tensor, rows: Tensor) -> None:
    """Copy the rows of a step into the buffer and repeat the last one to its end."""
    buffer[: len(rows)] = rows
    if len(rows) < len(buffer):
        buffer[len(rows) :] = rows[-1]


def cuda_recorder() -> Record:
    """Records CUDA graphs that share one memory pool."""
    pool = torch.cuda.graph_pool_handle()

    def record(compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        # Twice before recording, on a stream of its own: kernels are compiled and libraries take their workspaces.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = compute()
        return graph.replay, output

    return record
