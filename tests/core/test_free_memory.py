"""The memory that is free: the machine's, and what a container's limit leaves of it."""

from puzzle_trtllm.free_memory import free_memory_bytes


def test_a_containers_limit_counts(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemFree: 7 kB\nMemAvailable: 50 kB\n")

    def free() -> int | None:
        return free_memory_bytes(meminfo=tmp_path / "meminfo", cgroup=tmp_path)

    assert free() == 50 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("9000\n")
    (tmp_path / "memory.stat").write_text("anon 8000\ninactive_file 1000\n")
    assert free() == 50 * 1024
    (tmp_path / "memory.max").write_text("10000\n")
    assert free() == 2000  # 10000 - 9000, and 1000 that the kernel would give back
    assert free_memory_bytes(meminfo=tmp_path / "none", cgroup=tmp_path) is None
