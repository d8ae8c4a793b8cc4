"""Where calibration records come from: files, local dataset folders, the Hugging Face hub.

| source | read with | drawn |
| --- | --- | --- |
| `.jsonl`, one JSON object a line | our own line index | uniformly, by the seed |
| `.txt`, paragraphs between blank lines | | uniformly, by the seed |
| `.parquet` | pyarrow, only the row groups and columns in question | uniformly, by the seed |
| a folder, or a name on the hub | `datasets.load_dataset(..., streaming=True)` | by the library's seeded shuffle |

Nothing is read whole but a .txt file: only the records that are drawn are parsed. A streamed dataset has no length, so
the library's shuffle draws from a buffer of SHUFFLE_BUFFER records that slides over its shards in a seeded order.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import CalibrationError
from puzzle_trtllm.json_files import unique_keys

SHUFFLE_BUFFER = 10_000
KINDS = ".jsonl, .txt or .parquet"

Record = tuple[str, Mapping[str, Any]]
"""Where it stands (`file:line`), and what it says, by column."""

Reader = Callable[[Path, int, int], Iterator[Record]]
"""`reader(file, max_samples, seed)`"""


def draw_records(
    source: str | Path,
    *,
    columns: Sequence[str],
    max_samples: int,
    seed: int,
    config: str | None = None,
    split: str = "train",
) -> Iterator[Record]:
    """At most `max_samples` records of `source` in a seeded order, none twice.

    `columns` are those that somebody will read; where leaving out the others saves work, they are None. `config` and
    `split` belong to datasets of the hub and in folders. Raises CalibrationError in one line for a source that is
    missing, empty, damaged, or of an unknown kind.
    """
    file = Path(source)
    if file.is_dir() or (not file.exists() and _may_be_on_the_hub(str(source))):
        return _draw_dataset(str(source), max_samples, seed, config, split)
    if not file.is_file():
        raise CalibrationError("missing", file=file, expected=f"a {KINDS} file, a folder, or a name on the hub")
    if config is not None:
        raise CalibrationError("only datasets of the hub and in folders have a config", file=file, found=config)
    try:
        readers: dict[str, Reader] = {
            ".jsonl": _draw_lines,
            ".txt": _draw_paragraphs,
            ".parquet": partial(_draw_rows, columns),
        }
        if file.suffix not in readers:
            raise CalibrationError(
                "unknown kind of dataset", file=file, found=file.suffix or "no suffix", expected=KINDS
            )
        return readers[file.suffix](file, max_samples, seed)
    except OSError as error:
        raise CalibrationError(f"cannot be read: {error}", file=file) from None


def _may_be_on_the_hub(source: str) -> bool:
    """`owner/name` or a bare name, neither of which looks like one of our files."""
    parts = source.split("/")
    return len(parts) <= 2 and all(parts) and Path(source).suffix not in KINDS.replace(",", "").split()


def _choose(count: int, max_samples: int, seed: int, file: Path) -> list[int]:
    """A seeded choice without repetition, in a seeded order (so that a token budget cuts no particular part)."""
    if count == 0:
        raise CalibrationError("empty", file=file, expected="at least one record")
    return random.Random(seed).sample(range(count), min(max_samples, count))


def _draw_lines(file: Path, max_samples: int, seed: int) -> Iterator[Record]:
    starts: list[tuple[int, int]] = []
    with file.open("rb") as stream:
        offset = 0
        for number, line in enumerate(stream, 1):
            if line.strip():
                starts.append((number, offset))
            offset += len(line)
    chosen = _choose(len(starts), max_samples, seed, file)

    def records() -> Iterator[Record]:
        with file.open("rb") as stream:
            for index in chosen:
                number, offset = starts[index]
                stream.seek(offset)
                yield _parse(stream.readline(), f"{file}:{number}")

    return records()


def _parse(line: bytes, place: str) -> Record:
    try:
        record = json.loads(line, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"not valid JSON: {error}", file=place) from None
    if not isinstance(record, dict):
        raise CalibrationError("unknown record", file=place, found=type(record).__name__, expected="an object")
    return place, record


def _draw_paragraphs(file: Path, max_samples: int, seed: int) -> Iterator[Record]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"cannot be read: {error}", file=file) from None
    paragraphs = [part.strip("\n") for part in text.replace("\r\n", "\n").split("\n\n")]
    records = [(f"{file}: paragraph {i}", {"text": part}) for i, part in enumerate(paragraphs, 1) if part]
    return iter([records[index] for index in _choose(len(records), max_samples, seed, file)])


def _draw_rows(columns: Sequence[str], file: Path, max_samples: int, seed: int) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        chosen = _choose(table.metadata.num_rows, max_samples, seed, file)
        names = table.schema_arrow.names
        read = [name for name in names if name in columns]
        return iter([(place, {**dict.fromkeys(names), **row}) for place, row in _read_rows(table, read, chosen, file)])
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot be read as Parquet: {str(error).splitlines()[0]}", file=file) from None


def _read_rows(table: Any, columns: list[str], chosen: list[int], file: Path) -> list[Record]:
    """These columns of the chosen rows, each row group that has one of them read once."""
    rows: dict[int, Mapping[str, Any]] = {}
    start = 0
    for group in range(table.num_row_groups):
        stop = start + table.metadata.row_group(group).num_rows
        wanted = sorted(row for row in chosen if start <= row < stop)
        if wanted:
            taken = table.read_row_group(group, columns=columns).take([row - start for row in wanted])
            found = taken.to_pylist() or [{}] * len(wanted)  # without columns a table has no rows
            rows |= dict(zip(wanted, found, strict=True))
        start = stop
    return [(f"{file}: row {row}", rows[row]) for row in chosen]


def _draw_dataset(name: str, max_samples: int, seed: int, config: str | None, split: str) -> Iterator[Record]:
    import datasets

    place = f"{name} ({split})"
    with _loading(place):
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
        rows = iter(stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).take(max_samples))
    records = _stream_rows(rows, place)
    first = next(records, None)
    if first is None:
        raise CalibrationError("empty", file=place, expected="at least one record")
    return chain([first], records)


def _stream_rows(rows: Iterator[Mapping[str, Any]], place: str) -> Iterator[Record]:
    for number in count():
        with _loading(place):
            row = next(rows, None)
        if row is None:
            return
        yield f"{place}: sample {number}", row


@contextmanager
def _loading(place: str) -> Iterator[None]:
    """Whatever the library's builders and its network raise, at first or later, as one line."""
    try:
        with _hushed():
            yield
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise CalibrationError(
            f"the dataset cannot be loaded: {type(error).__name__}: {line}",
            file=place,
            expected="a folder with data files, or a name that the hub delivers",
        ) from None


@contextmanager
def _hushed() -> Iterator[None]:
    """The hub's client warns at each of its retries; the error that ends them says it once."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets", "httpx")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
