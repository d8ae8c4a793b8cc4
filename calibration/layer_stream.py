"""Calibrating a model that does not fit in memory: layer by layer, all data through one before the next.

One decoder layer is resident. Its input, the hidden states of every sequence, is on disk and memory-mapped one
micro-batch at a time; its output is appended to the next layer's input. The micro-batches are those of the plain path,
and so is every operation on them: what is observed is the same to the bit. Memory: one dequantized layer (a second one
while it is being read, at the very most) and one micro-batch. Disk: the hidden states twice.

Beside the data that is observed, a layer can be given other text, in several variants whose hidden states drift apart
(SideRuns): held-out text under several ways to store K and V, say.

    .OUT.stream.partial-resumable/job.json           what is being calibrated, and how
    .OUT.stream.partial-resumable/hidden-007         input of layer 7, [tokens, D], micro-batch after micro-batch
    .OUT.stream.partial-resumable/hidden-007-unit    the same of a side run
    .OUT.stream.partial-resumable/layer-006.st       what was observed in layer 6, safetensors

A file has its name only once it is whole, and a layer's results appear after its output. So after a kill the same job
goes on behind the last result; another one starts over. A failure that the process lives to see removes everything.
Several ranks have such a folder each, and agree on the layer they go on from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from puzzle_trtllm.calibration.dataset import CalibrationDataset
from puzzle_trtllm.calibration.forward import MAX_TOKENS_PER_BATCH, naming_layers, num_threads, progress, threads
from puzzle_trtllm.calibration.memory import free_memory, old_objects_kept
from puzzle_trtllm.calibration.one_layer import embed, load_layer
from puzzle_trtllm.calibration.ranks import ALONE, Ranks
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.folders import claimed_sibling, clear_folder, write_atomically
from puzzle_trtllm.tensors import count_parameters

Observation = dict[str, torch.Tensor]


class LayerRun(Protocol):
    """Sends data through one layer; each run is to be called once."""

    def __call__(self, model: Any) -> None:
        """All micro-batches of the data that is observed."""

    def side(self, model: Any, name: str) -> None:
        """All micro-batches of the side run `name`."""


Visit = Callable[[Any, LayerRun, int], Observation]
"""`visit(model, run, layer)` gets one layer as a model, calls `run(model)` once, and returns what it saw."""

ReadHidden = Callable[[str], Iterator[torch.Tensor]]
"""The last layer's output of a side run, `[B, T, D]`, micro-batch after micro-batch."""


@dataclass(frozen=True, kw_only=True)
class SideRuns:
    """Other text that every layer is given, once under each name."""

    data: CalibrationDataset
    names: tuple[str, ...]
    finish: Callable[[ReadHidden], None]
    """Called behind the last layer."""


def stream_layers(
    source: Checkpoint,
    data: CalibrationDataset,
    visit: Visit,
    *,
    out: Path,
    what: str,
    dtype: torch.dtype,
    quiet: bool = True,
    side_runs: SideRuns | None = None,
    settings: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
    device: torch.device | None = None,
) -> list[Observation]:
    """What `visit` saw in each layer; `out` is the result's path, beside which the work is done.

    `settings` is whatever else the results depend on: a killed run with other ones is not gone on with.

    Raises CalibrationError for activations that are not finite, CheckpointError, PuzzleError (disk full, out in use).
    """
    source.validate()
    num_layers, parameters = source.architecture.num_layers, count_parameters(source.architecture)
    runs = _Runs.of(data, side_runs, ranks)
    job = _job(source, data, what=what, dtype=dtype, num_threads=num_threads(parameters))
    job |= {"side_runs": runs.describe_side(), "settings": dict(settings or {}), "device": str(device or "cpu")}
    bar = progress(quiet=quiet or not ranks.is_first)
    with _workplace(out, job, ranks) as folder, threads(parameters), bar, torch.no_grad(), old_objects_kept():
        first = _first_layer(folder, num_layers, runs, ranks)
        task = bar.add_task(f"{what}, layer by layer", total=num_layers * runs.num_tokens)
        bar.advance(task, first * runs.num_tokens)
        if first == 0:
            _write_embeddings(source, runs, folder, dtype)
        for layer in range(first, num_layers):
            run = _LayerPass(runs, folder, layer, num_layers, dtype=dtype, advance=partial(bar.advance, task))
            _save(visit(load_layer(source, layer, dtype=dtype, device=device), run, layer), _result(folder, layer))
            free_memory()
            ranks.wait()  # a layer's input is needed until every rank has that layer's result
            for name in runs.names:
                _hidden(folder, layer, name).unlink(missing_ok=True)
        if side_runs is not None:
            hidden_size = source.architecture.hidden_size
            side_runs.finish(lambda name: _read_all(_hidden(folder, num_layers, name), runs[name], hidden_size, dtype))
        return [load_file(_result(folder, layer)) for layer in range(num_layers)]


MAIN = ""
"""The run that is observed, among the names of runs."""


class _Runs:
    """This rank's micro-batches by run."""

    def __init__(self, batches: Mapping[str, Sequence[NDArray[np.int64]]], side: SideRuns | None) -> None:
        self._batches, self._side = batches, side

    @classmethod
    def of(cls, data: CalibrationDataset, side: SideRuns | None, ranks: Ranks) -> _Runs:
        batches = {MAIN: list(ranks.share(data.batches(MAX_TOKENS_PER_BATCH)))}
        if side is not None:
            shared = list(ranks.share(side.data.batches(MAX_TOKENS_PER_BATCH)))
            batches |= dict.fromkeys(side.names, shared)
        return cls(batches, side)

    def __getitem__(self, name: str) -> Sequence[NDArray[np.int64]]:
        return self._batches[name]

    @property
    def names(self) -> list[str]:
        return list(self._batches)

    @property
    def num_tokens(self) -> int:
        return sum(ids_BT.size for batches in self._batches.values() for ids_BT in batches)

    def describe_side(self) -> dict[str, Any] | None:
        return None if self._side is None else {"dataset": self._side.data.fingerprint, "names": self._side.names}


class _LayerPass:
    """All micro-batches of a run through one layer, from its input on disk to the next one's."""

    def __init__(
        self,
        runs: _Runs,
        folder: Path,
        layer: int,
        num_layers: int,
        *,
        dtype: torch.dtype,
        advance: Callable[[int], None],
    ) -> None:
        self._runs, self._folder, self._dtype, self._advance = runs, folder, dtype, advance
        self._layer, self._last = layer, layer == num_layers - 1

    def __call__(self, model: Any) -> None:
        self._run(model, MAIN, None if self._last else _hidden(self._folder, self._layer + 1, MAIN))

    def side(self, model: Any, name: str) -> None:
        self._run(model, name, _hidden(self._folder, self._layer + 1, name))

    def _run(self, model: Any, name: str, output: Path | None) -> None:
        hidden_size, source = model.config.hidden_size, _hidden(self._folder, self._layer, name)
        device = next(model.parameters()).device
        inputs = _read_all(source, self._runs[name], hidden_size, self._dtype)
        with naming_layers(model, first_layer=self._layer), _written_whole(output) as write:
            for input_BTD in inputs:
                write(model.model(inputs_embeds=input_BTD.to(device), use_cache=False).last_hidden_state.cpu())
                self._advance(input_BTD.shape[0] * input_BTD.shape[1])


def _read_all(
    file: Path, batches: Sequence[NDArray[np.int64]], hidden_size: int, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Hidden states of one micro-batch after the other, copied, so that pages are given back with the map."""
    offset = 0
    for ids_BT in batches:
        hidden_BTD = torch.empty((*ids_BT.shape, hidden_size), dtype=dtype)
        shape = (hidden_BTD.nbytes,)
        hidden_BTD.view(-1).view(torch.uint8).numpy()[:] = np.memmap(
            file, dtype=np.uint8, mode="r", offset=offset, shape=shape
        )
        offset += hidden_BTD.nbytes
        yield hidden_BTD


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


def _write_embeddings(source: Checkpoint, runs: _Runs, folder: Path, dtype: torch.dtype) -> None:
    for name in runs.names:
        with _written_whole(_hidden(folder, 0, name)) as write:
            for ids_BT in runs[name]:
                write(embed(source, torch.from_numpy(ids_BT), dtype=dtype))


def _save(seen: Observation, file: Path) -> None:
    unfinished = file.with_name(f"{file.name}.partial")
    save_file({name: value.contiguous() for name, value in seen.items()}, unfinished)
    unfinished.rename(file)


def _first_layer(folder: Path, num_layers: int, runs: _Runs, ranks: Ranks) -> int:
    """Where all ranks go on: behind the last layer that all have results of, or at 0 if one lacks the next's input."""
    finished = next((i for i in range(num_layers) if not _result(folder, i).is_file()), num_layers)
    first = ranks.smallest(finished)
    needed = [name for name in runs.names if name != MAIN or first < num_layers]
    first = ranks.smallest(first if all(_hidden(folder, first, name).is_file() for name in needed) else 0)
    for layer in range(first, num_layers):
        _result(folder, layer).unlink(missing_ok=True)
    return first


def _hidden(folder: Path, layer: int, name: str) -> Path:
    return folder / (f"hidden-{layer:03d}-{name}" if name else f"hidden-{layer:03d}")


def _result(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.st"


@contextmanager
def _workplace(out: Path, job: Mapping[str, Any], ranks: Ranks) -> Iterator[Path]:
    """A hidden folder beside `out`, empty or with what a killed process left of the same job; removed at the end."""
    place, text = Path(out).absolute(), json.dumps(job, sort_keys=True)
    of_rank = f"-rank-{ranks.rank}-of-{ranks.size}" if ranks.size > 1 else ""
    place = place.with_name(f"{place.name}.stream{of_rank}")
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
