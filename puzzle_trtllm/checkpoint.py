"""A Hugging Face checkpoint folder: config.json, safetensors shards, and the files that ride along.

Opening reads headers only. The folder is checked as a whole: the index (if any) may name only files inside the folder,
every file must be there, no tensor may occur in two files (engines that glob the folder would take either). `validate`
then holds the tensors against the architecture's table: nothing missing, nothing unknown, every shape and dtype right.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.errors import ArchitectureError, CheckpointError
from puzzle_trtllm.json_files import read_json_object
from puzzle_trtllm.kv_scales import KV_CALIBRATION_NAME
from puzzle_trtllm.safetensors_file import TensorEntry, read_header
from puzzle_trtllm.tensors import TensorSpec, kv_scale_of, tensor_table

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
_HUB_PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.txt",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "USAGE_POLICY*",
)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_NUMPY_DTYPES: Mapping[str, type[np.generic]] = {
    "U8": np.uint8,
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I32": np.int32,
    "I64": np.int64,
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: its config and where each tensor's bytes are."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a folder, or a hub id (`org/name`), which is downloaded first. Raises CheckpointError."""
        folder = resolve_folder(path)
        if not (folder / "config.json").is_file():
            raise CheckpointError("missing", file=folder / "config.json", expected="a Hugging Face checkpoint folder")
        _check_entries(folder)
        tensors: dict[str, TensorEntry] = {}
        for file in _shard_files(folder):
            for name, entry in read_header(file)[0].items():
                if name in tensors:
                    raise CheckpointError(
                        "the same tensor is in two files", file=file, key=name, found=tensors[name].file.name
                    )
                tensors[name] = entry
        _check_index(folder, tensors)
        return cls(path=folder, config=read_json_object(folder / "config.json", ArchitectureError), tensors=tensors)

    @cached_property
    def architecture(self) -> PuzzleArchitecture:
        return PuzzleArchitecture.from_config(self.config, source=self.path / "config.json")

    def without(self, names: Collection[str]) -> Checkpoint:
        """The same checkpoint, blind to the tensors `names`."""
        return replace(self, tensors={name: entry for name, entry in self.tensors.items() if name not in names})

    @cached_property
    def kv_scales(self) -> Mapping[tuple[int, str], TensorEntry]:
        """Calibrated scales by (layer, "k" | "v" | "q"), under whichever of their names they are stored.

        Raises CheckpointError when one is stored under two names: nobody could say which holds.
        """
        scales: dict[tuple[int, str], TensorEntry] = {}
        for name, entry in self.tensors.items():
            key = kv_scale_of(name)
            if key in scales:
                raise CheckpointError(
                    "the same KV scale under two names", file=entry.file, key=name, found=f"{scales[key].name} as well"
                )
            if key is not None:
                scales[key] = entry
        return scales

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    def validate(self) -> None:
        """Hold every tensor against the architecture. Raises CheckpointError at the first that does not fit."""
        self._check_dtype()
        expected = tensor_table(self.architecture)
        for name, spec in expected.items():
            if name not in self.tensors:
                raise CheckpointError("missing tensor", file=self.path, key=name, expected=_describe(spec))
            entry = self.tensors[name]
            if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
                raise CheckpointError(
                    "wrong dtype or shape", file=entry.file, key=name, found=_describe(entry), expected=_describe(spec)
                )
        for name, entry in self.tensors.items():
            if name not in expected and kv_scale_of(name) is None:
                raise CheckpointError("no such tensor in this architecture", file=entry.file, key=name)

    def _check_dtype(self) -> None:
        """Engines compute in what config.json says, and in float16 a gpt-oss overflows. The tensors below are BF16."""
        for key in ("dtype", "torch_dtype"):
            found = self.config.get(key)
            if found not in (None, "bfloat16"):
                message = "is not that of the tensors"
                file = self.path / "config.json"
                raise CheckpointError(message, file=file, key=key, found=json.dumps(found), expected='"bfloat16"')

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, memory-mapped, uint8 `[num_bytes]`."""
        entry = self.entry(name)
        if entry.num_bytes == 0:
            return np.empty(0, dtype=np.uint8)
        return np.memmap(entry.file, dtype=np.uint8, mode="r", offset=entry.offset, shape=(entry.num_bytes,))

    def numpy(self, name: str) -> NDArray[Any]:
        """The tensor as a memory-mapped array of its shape; BF16 comes as its uint16 bit patterns."""
        entry = self.entry(name)
        if entry.dtype not in _NUMPY_DTYPES:
            expected = ", ".join(_NUMPY_DTYPES)
            raise CheckpointError("cannot be read", file=entry.file, key=name, found=entry.dtype, expected=expected)
        return self.raw(name).view(_NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)

    def float32(self, name: str) -> NDArray[np.float32]:
        """A float tensor widened to float32 (a copy)."""
        values = self.numpy(name)
        if self.entry(name).dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)

    def torch(self, name: str, part: tuple[slice, ...] = ()) -> torch.Tensor:
        """The tensor, or only `part` of it, as a torch tensor that owns its memory; no more than that is read."""
        import torch

        values = torch.from_numpy(np.array(self.numpy(name)[part]))
        return values.view(torch.bfloat16) if self.entry(name).dtype == "BF16" else values

    def entry(self, name: str) -> TensorEntry:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError("missing tensor", file=self.path, key=name) from None

    def fingerprint(self) -> str:
        """`sha256:...` over config.json, all tensor names, dtypes and shapes, and the router and norm bytes.

        Enough to tell two checkpoints of one family apart without reading 60 GB; used wherever provenance is written
        or checked.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, separators=(",", ":")).encode())
        for name in sorted(self.tensors):
            entry = self.tensors[name]
            digest.update(f"\n{name} {entry.dtype} {list(entry.shape)}".encode())
            if ".mlp.router." in name or "norm." in name:
                digest.update(self.raw(name).tobytes())
        return f"sha256:{digest.hexdigest()}"

    def companion_files(self) -> list[Path]:
        """Files that ride along unchanged: everything but config.json, tensors, their index and our own records."""
        own = {"config.json", INDEX_NAME, "hf_quant_config.json", "derivation.json"}
        return sorted(
            file
            for file in self.path.iterdir()
            if file.is_file() and file.name not in own and file.suffix != ".safetensors"
        )


def resolve_folder(path: str | Path, *, weights: bool = True) -> Path:
    """`path` if it is a folder; the local snapshot of a hub id otherwise (downloaded where the hub is reachable).

    Without `weights` only config.json and the index of a hub id are fetched.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.match(str(path)):
        raise CheckpointError(
            "a file, not a checkpoint folder" if folder.exists() else "no such checkpoint folder",
            file=path,
            expected="a folder, or a hub id such as openai/gpt-oss-120b",
        )
    from huggingface_hub import snapshot_download

    wanted = list(_HUB_PATTERNS) if weights else ["config.json", INDEX_NAME]
    subfolders = ["*/*"]  # a pattern's * crosses "/": the original weights in openai/gpt-oss-120b are 65 GB more
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted, ignore_patterns=subfolders))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"no such folder, and the hub did not deliver it: {type(error).__name__}: {reason}", file=path
        ) from None


def read_weight_map(index_file: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says it. Raises CheckpointError."""
    weight_map = read_json_object(index_file, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError("must be an object", file=index_file, key="weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError("names a file outside the folder", file=index_file, key=name, found=json.dumps(shard))
    return weight_map


def _check_entries(folder: Path) -> None:
    """What is no file would look like one that the model never had. The hub's cache links into its own files."""
    for file in sorted(folder.iterdir()):
        if file.name.startswith("."):  # an editor's lock is a link to nothing
            continue
        if file.is_symlink() and not file.exists():
            raise CheckpointError("links to a file that is not there", file=file, found=file.readlink())
        if not (file.is_file() or file.is_dir()):
            raise CheckpointError("is a pipe or a device, not a file", file=file)


def _shard_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != KV_CALIBRATION_NAME)
    if not files:
        raise CheckpointError("no *.safetensors files", file=folder)
    return files


def _check_index(folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
    index_file = folder / INDEX_NAME
    if not index_file.exists():
        return
    weight_map = read_weight_map(index_file)
    shards = {file.name for file in _shard_files(folder)}
    for name, shard in weight_map.items():
        if shard not in shards:
            raise CheckpointError("missing shard", file=folder / shard, key=name)
        if name not in tensors:
            raise CheckpointError("missing tensor", file=folder / shard, key=name)
        if tensors[name].file.name != shard:
            raise CheckpointError(
                "is in another shard", file=index_file, key=name, found=tensors[name].file.name, expected=shard
            )
    for name, entry in tensors.items():
        if name not in weight_map:
            raise CheckpointError(
                "is in a shard but not in the index", file=index_file, key=name, found=entry.file.name
            )


def _describe(spec: TensorSpec | TensorEntry) -> str:
    return f"{spec.dtype} {list(spec.shape)}"
