"""Checkpoint folders: opened whole or refused with one line that names the file and the tensor."""

from __future__ import annotations

import json

import numpy as np
import pytest

from puzzle_trtllm.checkpoint import INDEX_NAME, Checkpoint, resolve_folder
from puzzle_trtllm.checkpoint_writer import rewrite_checkpoint, tensor_of
from puzzle_trtllm.errors import ArchitectureError, CheckpointError, PuzzleError
from puzzle_trtllm.tensors import count_weight_bytes, kv_scale_of

BLOCKS = [(4, 16), (3, None)]
ROUTER = "model.layers.1.mlp.router.weight"


@pytest.fixture
def folder(make_checkpoint):
    return make_checkpoint(BLOCKS)


def refused(folder, *, match: str, error: type[PuzzleError] = CheckpointError, validate: bool = False) -> None:
    with pytest.raises(error, match=match) as caught:
        checkpoint = Checkpoint.open(folder)
        assert validate, "opened without complaint"
        checkpoint.validate()
    assert "\n" not in str(caught.value)


def edit_index(folder, change) -> None:
    file = folder / INDEX_NAME
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def replaced(folder, tmp_path, replace):
    """A copy of the folder with tensors replaced (None drops one)."""
    source, out = Checkpoint.open(folder), tmp_path / "replaced"
    out.mkdir()
    rewrite_checkpoint(source, out, config=source.config, replace=replace)
    return out


K_SCALE = "model.layers.0.self_attn.k_proj.k_scale"


def with_a_scale(folder, tmp_path, dtype, value):
    """A copy of the folder with one K scale of this dtype."""
    source, out = Checkpoint.open(folder), tmp_path / "scaled"
    out.mkdir()
    rewrite_checkpoint(source, out, config=source.config, replace={}, add=[tensor_of(K_SCALE, dtype, value)])
    return out


class TestReading:
    def test_numbers_come_back_as_torch_sees_them(self, folder):
        torch = pytest.importorskip("torch")
        load_file = pytest.importorskip("safetensors.torch").load_file
        checkpoint = Checkpoint.open(folder)
        library = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
        assert set(library) == set(checkpoint.tensors)
        for name, expected in library.items():
            assert torch.equal(checkpoint.torch(name), expected), name
            assert checkpoint.float32(name).tolist() == expected.float().tolist(), name
            assert checkpoint.raw(name).tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes(), name

    def test_weight_bytes_are_the_tables(self, folder):
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.weight_bytes == count_weight_bytes(checkpoint.architecture)

    def test_companions_are_what_rides_along(self, folder):
        (folder / "kv_calibration.safetensors").write_bytes(b"")
        names = [file.name for file in Checkpoint.open(folder).companion_files()]
        assert names == ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("model.layers.3.self_attn.k_proj.k_scale", (3, "k")),
            ("model.layers.3.self_attn.v_scale", (3, "v")),
            ("model.layers.12.self_attn.q_scale", (12, "q")),
            ("model.layers.3.self_attn.k_proj.v_scale", None),
            ("model.layers.3.self_attn.k_proj.weight_scale", None),
            ("model.layers.3.self_attn.k_proj.weight", None),
        ],
    )
    def test_scales_are_known_under_every_name(self, name, expected):
        assert kv_scale_of(name) == expected

    def test_kv_scales_by_layer(self, make_checkpoint):
        checkpoint = Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=[(0.5, 1.0), (2.0, 4.0)]))
        found = {key: float(checkpoint.numpy(entry.name)) for key, entry in checkpoint.kv_scales.items()}
        assert found == {(0, "k"): 0.5, (0, "v"): 1.0, (1, "k"): 2.0, (1, "v"): 4.0}

    def test_a_float_of_64_bits_is_narrowed(self, folder, tmp_path):
        out = with_a_scale(folder, tmp_path, "F64", np.float64(0.25))
        values = Checkpoint.open(out).float32(K_SCALE)
        assert (values.dtype, float(values)) == (np.float32, 0.25)

    def test_a_dtype_that_numpy_lacks_is_one_line(self, folder, tmp_path):
        out = with_a_scale(folder, tmp_path, "F8_E8M0", np.uint8(127))
        with pytest.raises(CheckpointError, match=r"k_scale: cannot be read .found F8_E8M0, expected .*F64"):
            Checkpoint.open(out).float32(K_SCALE)


def test_the_hub_is_asked_for_what_rides_along_but_no_subfolder(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    files = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "LICENSE", "USAGE_POLICY"]
    files += ["NOTICE.txt", "o200k.tiktoken", "README.md", "original/model.safetensors", "original/config.json"]
    taken = []

    def download(name: str, **patterns: list[str]) -> str:
        taken.extend(hub.utils.filter_repo_objects(files, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_folder("openai/gpt-oss-120b") == tmp_path
    assert taken == files[:7]


class TestFingerprint:
    def test_does_not_depend_on_the_place_or_the_sharding(self, make_checkpoint):
        one = Checkpoint.open(make_checkpoint(BLOCKS))
        many = Checkpoint.open(make_checkpoint(BLOCKS, max_shard_bytes=20_000))
        assert len({entry.file for entry in many.tensors.values()}) > len({e.file for e in one.tensors.values()})
        assert one.fingerprint() == many.fingerprint()

    @pytest.mark.parametrize("name", [ROUTER, "model.norm.weight", "model.layers.0.input_layernorm.weight"])
    def test_changes_with_router_and_norm_bytes(self, folder, tmp_path, name):
        checkpoint = Checkpoint.open(folder)
        values = checkpoint.numpy(name) ^ 1
        out = replaced(folder, tmp_path, {name: tensor_of(name, "BF16", values)})
        assert Checkpoint.open(out).fingerprint() != checkpoint.fingerprint()

    def test_changes_with_the_config(self, folder):
        before = Checkpoint.open(folder).fingerprint()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
        assert Checkpoint.open(folder).fingerprint() != before


class TestDamagedFolders:
    def test_no_such_folder(self, tmp_path):
        refused(tmp_path / "nowhere", match="no such checkpoint folder")
        (tmp_path / "config.json").touch()
        refused(
            tmp_path / "config.json",
            match=r"config\.json: a file, not a checkpoint folder \(expected a folder, or a hub",
        )

    @pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
    def test_a_dtype_that_is_not_the_tensors(self, folder, key):
        """TensorRT-LLM would compute in it."""
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: "float16"}))
        refused(
            folder,
            match=rf'config\.json: {key}: is not that of the tensors .found "float16", expected "bfloat16"',
            validate=True,
        )

    def test_no_config(self, folder):
        (folder / "config.json").unlink()
        refused(folder, match=r"config\.json: missing")

    def test_config_is_not_json(self, folder):
        (folder / "config.json").write_text("{")
        refused(folder, match="not valid JSON", error=ArchitectureError)

    def test_no_shards(self, folder):
        for file in folder.glob("*.safetensors"):
            file.unlink()
        refused(folder, match="no .*safetensors files")

    def test_truncated_shard(self, folder):
        file = sorted(folder.glob("*.safetensors"))[-1]
        file.write_bytes(file.read_bytes()[:-1])
        refused(folder, match=rf"{file.name}: .*: the file is truncated")

    def test_corrupt_header(self, folder):
        file = sorted(folder.glob("*.safetensors"))[0]
        data = bytearray(file.read_bytes())
        data[8] = ord("x")
        file.write_bytes(data)
        refused(folder, match=rf"{file.name}: corrupt header")

    def test_missing_shard(self, folder):
        file = sorted(folder.glob("*.safetensors"))[0]
        file.unlink()
        refused(folder, match=rf"{file.name}: .*: missing shard")

    @pytest.mark.parametrize("outside", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", "", 7])
    def test_index_names_a_path_outside(self, folder, outside):
        edit_index(folder, lambda weight_map: weight_map.update({ROUTER: outside}))
        refused(folder, match=rf"{ROUTER}: names a file outside the folder")

    def test_index_names_no_shard_that_a_file_system_could_hold(self, folder):
        edit_index(folder, lambda weight_map: weight_map.update({ROUTER: "x" * 5000}))
        refused(folder, match=rf"{ROUTER}: missing shard")

    def test_a_link_into_a_cache_that_lost_the_file(self, folder):
        """Else a checkpoint would silently have no tokenizer, or no generation config."""
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.json").symlink_to("../../blobs/gone")
        refused(folder, match=r"tokenizer\.json: links to a file that is not there \(found \.\./\.\./blobs/gone")

    def test_a_key_that_occurs_twice(self, folder):
        """Python's JSON reader would take the last."""
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"head_dim"', '"vocab_size": 7,\n  "head_dim"'))
        with pytest.raises(ArchitectureError, match=r"config\.json: vocab_size: occurs twice"):
            Checkpoint.open(folder)

    def test_index_misplaces_a_tensor(self, folder):
        other = sorted(folder.glob("*.safetensors"))[-1].name
        edit_index(folder, lambda weight_map: weight_map.update({ROUTER: other}))
        refused(folder, match=rf"{ROUTER}: is in another shard")

    def test_index_names_a_tensor_that_is_not_there(self, folder):
        shard = sorted(folder.glob("*.safetensors"))[0].name
        edit_index(folder, lambda weight_map: weight_map.update({"model.extra": shard}))
        refused(folder, match=r"model\.extra: missing tensor")

    def test_index_forgets_a_tensor(self, folder):
        edit_index(folder, lambda weight_map: weight_map.pop(ROUTER))
        refused(folder, match=rf"{ROUTER}: is in a shard but not in the index")

    def test_index_without_a_weight_map(self, folder):
        (folder / INDEX_NAME).write_text("{}")
        refused(folder, match="weight_map: must be an object")

    def test_the_same_tensor_in_two_files(self, folder):
        shard = sorted(folder.glob("*.safetensors"))[0]
        (folder / "stale.safetensors").write_bytes(shard.read_bytes())
        refused(folder, match=r"stale\.safetensors: .*: the same tensor is in two files")

    def test_missing_tensor(self, folder, tmp_path):
        refused(replaced(folder, tmp_path, {ROUTER: None}), match=rf"{ROUTER}: missing tensor", validate=True)

    def test_unknown_tensor(self, folder, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        source = Checkpoint.open(folder)
        extra = tensor_of("model.layers.0.extra", "U8", np.zeros(3, np.uint8))
        rewrite_checkpoint(source, out, config=source.config, replace={}, add=[extra])
        refused(out, match=r"model\.layers\.0\.extra: no such tensor", validate=True)

    @pytest.mark.parametrize(
        ("dtype", "values", "found"),
        [
            ("BF16", np.zeros((4, 64), np.uint16), r"BF16 \[4, 64\], expected BF16 \[3, 64\]"),
            ("F32", np.zeros((3, 64), np.float32), r"F32 \[3, 64\], expected BF16 \[3, 64\]"),
        ],
    )
    def test_wrong_shape_or_dtype(self, folder, tmp_path, dtype, values, found):
        out = replaced(folder, tmp_path, {ROUTER: tensor_of(ROUTER, dtype, values)})
        refused(out, match=rf"{ROUTER}: wrong dtype or shape \(found {found}\)", validate=True)
