"""Calibrating a model that does not fit in memory: layer by layer, all data through one before the next.

One decoder layer is resident. Its input, the hidden states of every sequence, is on disk and memory-mapped one
micro-batch at a time; its output is appended to the next layer's input. The micro-batches are those of the plain path,
and so is every operation on them: what is observed is the same to the bit. Memory: one dequantized layer (a second one
while it is being read, at the very most) and one micro-batch. Disk: the hidden states twice.

    .OUT.stream.partial-resumable/job.json           what is being calibrated, and how
    .OUT.stream.partial-resumable/hidden-007         input of layer 7, [tokens, D], micro-batch after micro-batch
    .OUT.stream.partial-resumable/layer-006.st       what was observed in layer 6, safetensors

A file has its name only once it is whole, and a layer's results appear after its output. So after a kill the same job
goes on behind the last result; another one starts over. A failure that the process lives to see removes everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from puzzle_trtllm.calibration.dataset import CalibrationDataset
from puzzle_trtllm.calibration.forward import MAX_TOKENS_PER_BATCH, naming_layers, num_threads, threads
from puzzle_trtllm.calibration.one_layer import embed, load_layer
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.folders import claimed_sibling, clear_folder, write_atomically
from puzzle_trtllm.tensors import count_parameters

Observation = dict[str, torch.Tensor]
Visit = Callable[[Any, Callable[[Any], None], int], Observation]
"""`visit(model, run, layer)` gets one layer as a model, calls `run(model)` once, and returns what it saw."""


def stream_layers(
    source: Checkpoint,
    data: CalibrationDataset,
    visit: Visit,
    *,
    out: Path,
    what: str,
    dtype: torch.dtype,
    quiet: bool = True,
) -> list[Observation]:
    """What `visit` saw in each layer; `out` is the result's path, beside which the work is done.

    Raises CalibrationError for activations that are not finite, CheckpointError, PuzzleError (disk full, out in use).
    """
    source.validate()
    num_layers, parameters = source.architecture.num_layers, count_parameters(source.architecture)
    job = _job(source, data, what=what, dtype=dtype, num_threads=num_threads(parameters))
    bar = Progress(console=Console(stderr=True), disable=quiet)
    with _workplace(out, job) as folder, threads(parameters), bar, torch.no_grad():
        first = _finished_layers(folder, num_layers)
        task = bar.add_task(f"{what}, layer by layer", total=num_layers * data.num_tokens)
        bar.advance(task, first * data.num_tokens)
        if first == 0:
            _write_embeddings(source, data, _hidden(folder, 0), dtype)
        for layer in range(first, num_layers):
            last = layer == num_layers - 1
            states = _LayerPass(data, folder, layer, last=last, dtype=dtype, advance=partial(bar.advance, task))
            _save(visit(load_layer(source, layer, dtype=dtype), states.run, layer), _result(folder, layer))
            _hidden(folder, layer).unlink()
        return [load_file(_result(folder, layer)) for layer in range(num_layers)]


class _LayerPass:
    """All micro-batches through one layer, from its input on disk to the next one's."""

    def __init__(
        self,
        data: CalibrationDataset,
        folder: Path,
        layer: int,
        *,
        last: bool,
        dtype: torch.dtype,
        advance: Callable[[int], None],
    ) -> None:
        self._data, self._layer, self._dtype, self._advance = data, layer, dtype, advance
        self._input = _hidden(folder, layer)
        self._output = None if last else _hidden(folder, layer + 1)

    def run(self, model: Any) -> None:
        hidden_size = model.config.hidden_size
        with naming_layers(model, first_layer=self._layer), _written_whole(self._output) as write:
            offset = 0
            for ids_BT in self._data.batches(MAX_TOKENS_PER_BATCH):
                input_BTD = self._read(offset, (*ids_BT.shape, hidden_size))
                offset += input_BTD.nbytes
                write(model.model(inputs_embeds=input_BTD, use_cache=False).last_hidden_state)
                self._advance(ids_BT.size)

    def _read(self, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        """One micro-batch, copied, so that its pages are given back with the map and its memory is torch's own."""
        num_bytes = int(np.prod(shape)) * self._dtype.itemsize
        mapped = np.memmap(self._input, dtype=np.uint8, mode="r", offset=offset, shape=(num_bytes,))
        hidden = torch.empty(shape, dtype=self._dtype)
        hidden.view(-1).view(torch.uint8).numpy()[:] = mapped
        return hidden


@contextmanager
def _written_whole(file: Path | None) -> Iterator[Callable[[torch.Tensor], None]]:
    """Yield a function that appends a tensor's bytes to `file`, which has its name only after the block."""
    if file is None:
        yield lambda hidden: None
        return
    unfinished = file.with_name(f"{file.name}.partial")
    with unfinished.open("wb") as stream:  # not through a map: a full disk would be a bus error

        def write(hidden: torch.Tensor) -> None:
            stream.write(hidden.contiguous().view(-1).view(torch.uint8).numpy().data)

        yield write
    unfinished.rename(file)


def _write_embeddings(source: Checkpoint, data: CalibrationDataset, file: Path, dtype: torch.dtype) -> None:
    with _written_whole(file) as write:
        for ids_BT in data.batches(MAX_TOKENS_PER_BATCH):
            write(embed(source, torch.from_numpy(ids_BT), dtype=dtype))


def _save(seen: Observation, file: Path) -> None:
    unfinished = file.with_name(f"{file.name}.partial")
    save_file({name: value.contiguous() for name, value in seen.items()}, unfinished)
    unfinished.rename(file)


def _finished_layers(folder: Path, num_layers: int) -> int:
    """Layers whose results are there, from the first on; 0 if the input of the next one is not."""
    finished = next((i for i in range(num_layers) if not _result(folder, i).is_file()), num_layers)
    return finished if finished == num_layers or _hidden(folder, finished).is_file() else 0


def _hidden(folder: Path, layer: int) -> Path:
    return folder / f"hidden-{layer:03d}"


def _result(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.st"


@contextmanager
def _workplace(out: Path, job: Mapping[str, Any]) -> Iterator[Path]:
    """A hidden folder beside `out`, empty or with what a killed process left of the same job; removed at the end."""
    place, text = Path(out).absolute(), json.dumps(job, sort_keys=True)
    place = place.with_name(f"{place.name}.stream")
    with claimed_sibling(place, suffix="partial-resumable", overwrite=True) as folder:
        if not (folder / "job.json").is_file() or (folder / "job.json").read_text(encoding="utf-8") != text:
            clear_folder(folder)
            write_atomically(folder / "job.json", text)
        for unfinished in folder.glob("*.partial"):
            unfinished.unlink()
        yield folder


def _job(
    source: Checkpoint, data: CalibrationDataset, *, what: str, dtype: torch.dtype, num_threads: int
) -> dict[str, Any]:
    """Everything that the bits depend on."""
    shards = sorted({entry.file for entry in source.tensors.values()})
    return {
        "what": what,
        "checkpoint": source.fingerprint(),
        "shards": [[str(os.path.realpath(file)), file.stat().st_size, file.stat().st_mtime_ns] for file in shards],
        "dataset": data.fingerprint,
        "sequences": [len(sequence) for sequence in data.sequences],
        "dtype": str(dtype),
        "max_tokens_per_batch": MAX_TOKENS_PER_BATCH,
        "num_threads": num_threads,
        "torch": torch.__version__,
    }
