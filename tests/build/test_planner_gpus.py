"""gpus.yaml: every GPU has its data sheet, and a wrong file or name is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.gpus import GPU_FILE, load_gpu, load_gpus


def test_every_gpu_names_its_data_sheet_and_its_name_tells_its_memory() -> None:
    gpus = load_gpus()
    assert {"h100-80gb", "h200-141gb", "b200-180gb"} <= set(gpus)
    for name, gpu in gpus.items():
        assert "NVIDIA" in gpu.source
        assert "data sheet" in gpu.source
        advertised = int(name.rpartition("-")[2].removesuffix("gb"))
        assert advertised * 0.92 * 1e9 < gpu.memory_bytes < advertised * 2**30 * 1.01


def test_units_are_converted_once() -> None:
    """The H100 SXM data sheet: 3.35 TB/s, 989 TFLOPS BF16 dense, 450 GB/s of NVLink each way."""
    h100 = load_gpu("h100-80gb")
    assert (h100.memory_bytes_per_s, h100.link_bytes_per_s) == (3.35e12, 4.5e11)
    assert h100.bf16_flops_per_s == pytest.approx(989.4e12)
    assert h100.expert_flops_per_s == h100.bf16_flops_per_s  # W4A16 below compute capability 10.0
    b200 = load_gpu("b200-180gb")
    assert b200.expert_flops_per_s == b200.fp8_flops_per_s == 4.5e15  # W4A8 on Blackwell
    assert load_gpu("a100-80gb").fp8_flops_per_s is None


def test_an_unknown_gpu_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown GPU \(found h100, expected one of: h100-80gb, h200-141gb"):
        load_gpu("h100")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("memory_mib: 81559", "memory_mib: -1", r"gpus.h100-80gb.memory_mib"),
        ("link: NVLink 4", "links: 3", r"gpus.h100-80gb"),
        ("memory_mib: 81559", "", r"gpus.h100-80gb.memory_mib: missing key"),
    ],
)
def test_a_damaged_table_names_file_and_key(tmp_path: Path, old: str, new: str, words: str) -> None:
    file = tmp_path / "gpus.yaml"
    file.write_text(GPU_FILE.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        load_gpus(file)
