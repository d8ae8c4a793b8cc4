"""`doctor --source`: the plugin's table held against source files that are never imported.

The tree is written from the table, a file a module; what a test changes in it must be noticed.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
from typer.testing import CliRunner

from puzzle_trtllm.cli import app
from puzzle_trtllm.doctor.source import diagnose_source
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.llm_args_schema import argument_classes, fields_of
from puzzle_trtllm.models.trtllm.source_tree import SourceTree
from puzzle_trtllm.models.trtllm.upstream import ALL_LINES, COMMAND_LINES, REQUIREMENTS

GPT_OSS = "tensorrt_llm/_torch/models/modeling_gpt_oss.py"
ARGUMENTS = "tensorrt_llm/llmapi/llm_args.py"
NEVER = "raise SystemExit('imported')\n"


def source_of(rows):
    """Definitions that fulfil the rows, none of which can be imported."""
    members, functions = defaultdict(list), []
    for row in rows:
        says = repr(" ".join(row.mentions))
        if "." in row.path:
            owner, method = row.path.split(".")
            arguments = ", ".join(["self", *row.parameters])
            members[owner].append(f"    def {method}({arguments}):\n        {says}\n")
        elif row.path and row.parameters:
            functions.append(f"def {row.path}({', '.join(row.parameters)}):\n    {says}\n")
        elif row.path:
            members[row.path].append(f"    {says}\n")
    classes = [f"class {name}:\n{''.join(body)}" for name, body in members.items()]
    return NEVER + "\n".join([*functions, *classes])


@pytest.fixture(params=ALL_LINES)
def tree(request, tmp_path):
    """(folder, line) of a tree in which every row holds."""
    line = request.param
    by_module = defaultdict(list)
    for row in (*REQUIREMENTS, *COMMAND_LINES):
        if line in row.lines:
            by_module[row.modules[-1] if line == "late" else row.modules[0]].append(row)
    packages = {name.rpartition(".")[0] for name in by_module} & set(by_module)
    for name, rows in by_module.items():
        path = tmp_path.joinpath(*name.split("."))
        file = path / "__init__.py" if name in packages or (line != "late" and name.endswith("llmapi")) else None
        file = file or path.with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        if any(not row.path for row in rows):
            file.write_text("\n".join(f"# {mention}" for row in rows for mention in row.mentions))
        else:
            file.write_text(source_of(rows))
    arguments = tmp_path / ARGUMENTS
    arguments.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"class Base:\n    shared: int\n{NEVER}"]
    for name in argument_classes():
        fields = "".join(f"    {field}: object = None\n" for field in fields_of(name, line))
        texts.append(f"class {name}(Base[int]):\n{fields}")
    arguments.write_text("\n".join(texts))
    version = {"1.2": "1.2.1", "1.3": "1.3.0rc4", "late": "1.4.0rc1"}[line]
    (tmp_path / "tensorrt_llm" / "version.py").write_text(f'__version__ = "{version}"\n')
    return tmp_path, line


def by_name(diagnosis):
    return {check.name: check for check in diagnosis.checks}


def edit(folder, file, old, new):
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))


def test_a_tree_that_fits(tree):
    folder, line = tree
    diagnosis = diagnose_source(folder)
    assert [check for check in diagnosis.checks if check.outcome in ("missing", "wrong")] == []
    assert diagnosis.ready
    checks = by_name(diagnosis)
    assert f"checked as line {line}" in checks["version"].found
    assert {row.key for row in REQUIREMENTS} | {"serve-flags", "bench-flags"} <= set(checks)
    assert checks["KvCacheConfig"].found.endswith("not recorded: shared"), "fields of bases count"
    assert by_name(diagnose_source(folder / "tensorrt_llm"))["version"].outcome == "ok", "the package folder will do"


@pytest.mark.parametrize(
    ("file", "old", "new", "row", "found"),
    [
        (GPT_OSS, "def __init__(self, config, layer_idx)", "def __init__(self, layer_idx, config)", "block", "order"),
        (GPT_OSS, "self.sliding_window", "self.window", "window-read", "no longer mentions self.sliding_window"),
        (GPT_OSS, "def load_weights(self, weights)", "def load(self, weights)", "sinks-load", "not defined"),
        (GPT_OSS, "(self, x)", "(self, x, lora_params, tokens)", "router-kernel", "own does not take: tokens"),
        (GPT_OSS, "class GptOssForCausalLM", "class GptOss", "causal-lm", "not defined"),
        (
            "tensorrt_llm/bench/benchmark/throughput.py",
            "--custom_module_dirs",
            "--modules",
            "bench-flags",
            "no longer mentions",
        ),
    ],
)
def test_what_no_longer_holds_is_named(tree, file, old, new, row, found):
    folder, _ = tree
    edit(folder, file, old, new)
    diagnosis = diagnose_source(folder)
    broken = by_name(diagnosis)[row]
    assert broken.outcome == "wrong" and found in broken.found and broken.advice.startswith("needed for: ")
    assert not diagnosis.ready


@pytest.mark.parametrize("place", ["modules", "moe"])
@pytest.mark.parametrize("owner", ["MoE", "CutlassFusedMoE"])
def test_the_experts_package_of_every_line(tree, place, owner):
    """Its place until and since autumn 2026; in 1.2 each class numbers its own experts, later their base does."""
    folder, _ = tree
    package = folder / "tensorrt_llm" / "_torch" / place / "fused_moe"
    (present,) = (folder / "tensorrt_llm" / "_torch").glob("*/fused_moe")
    package.parent.mkdir(exist_ok=True)
    present.rename(package)
    says = {name: "initial_local_expert_ids" if name == owner else "" for name in ("MoE", "CutlassFusedMoE")}
    loading_mode = "class MoEWeightLoadingMode:\n    FUSED_GATE_UP_PROJ = 1\n"
    (package / "interface.py").write_text(f"{loading_mode}class MoE:\n    {says['MoE']!r}\n")
    text = f"from .interface import MoE\nclass CutlassFusedMoE(MoE):\n    {says['CutlassFusedMoE']!r}\n"
    (package / "fused_moe_cutlass.py").write_text(text)
    checks = by_name(diagnose_source(folder))
    rows = ("fused-gate-up", "local-experts", "triton-experts")
    assert [checks[row].outcome for row in rows] == ["ok", "ok", "ok"]


def test_a_cache_manager_that_counts_too_few_heads_is_noted_with_the_way_out(tree):
    folder, _ = tree
    edit(folder, "tensorrt_llm/_torch/model_config.py", "enable_attention_dp", "tp_size")
    diagnosis = diagnose_source(folder)
    noted = by_name(diagnosis)["cache-heads"]
    assert noted.outcome == "note" and "divide free_gpu_memory_fraction" in noted.advice and diagnosis.ready


def test_an_argument_that_is_gone_is_noted(tree):
    folder, _ = tree
    edit(folder, ARGUMENTS, "    max_attention_window: object = None\n", "")
    check = by_name(diagnose_source(folder))["KvCacheConfig"]
    assert check.outcome == "note" and "gone: max_attention_window" in check.found


class TestSourceTree:
    """How names are found: what an import of the real package would give, without importing it."""

    @pytest.fixture
    def files(self, tmp_path):
        run = "def run(self, task, *, wait=True, **more): 'sinks'"
        texts = {
            "tensorrt_llm/api/__init__.py": "try:\n    from .inner import Public as LLM\nexcept ImportError:\n    pass",
            "tensorrt_llm/api/inner.py": "from ..base import *\nclass Public(Generic[int], Middle[str]): ...\n",
            "tensorrt_llm/base.py": f"if True:\n    class Middle:\n        {run}\nOther = Middle\n",
            "tensorrt_llm/circle.py": "from .circle import Round\nSelf = Self\n",
            "tensorrt_llm/fallback.py": "try:\n    from .base import Middle\nexcept Exception:\n    Middle = object\n",
        }
        for name, text in texts.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return SourceTree(tmp_path)

    def check(self, files, **row):
        row = {"key": "x", "needed_for": "x", "source": "x", "modules": ("tensorrt_llm.api",), **row}
        return files.check(type(REQUIREMENTS[0])(**row))

    def test_through_a_re_export_and_a_base_class(self, files):
        found = self.check(files, path="LLM.run", parameters=("task", "wait"), mentions=("sinks",))
        assert found.holds and found.module == "tensorrt_llm.base"

    def test_a_class_has_the_source_of_its_bases(self, files):
        assert self.check(files, path="LLM", mentions=("sinks",)).holds

    def test_a_name_set_to_another_one(self, files):
        """As CudaGraphConfig is since autumn 2026."""
        for modules, path in ((("tensorrt_llm.base",), "Other"), (("tensorrt_llm.fallback",), "Middle")):
            assert self.check(files, modules=modules, path=f"{path}.run", parameters=("task", "wait")).holds
        assert not self.check(files, modules=("tensorrt_llm.circle",), path="Self").holds

    def test_candidates_in_turn(self, files):
        assert self.check(files, modules=("tensorrt_llm.gone", "tensorrt_llm.api"), path="LLM").holds
        missing = self.check(files, modules=("tensorrt_llm.gone", "tensorrt_llm.circle"), path="Round")
        assert missing.problems == ("tensorrt_llm.gone: no such file", "tensorrt_llm.circle.Round: not defined")

    def test_no_version(self, files):
        assert files.version is None
        assert diagnose_source(files.root).checks[0].outcome == "wrong"
        assert diagnose_source(files.root, line="1.2").checks[0].outcome == "ok"

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("base.py", b"# caf\xe9\n", "base.py: not UTF-8 text"),
            ("version.py", b"# caf\xe9\n", "version.py: not UTF-8 text"),
            ("base.py", b"class", "base.py: not Python"),
            ("base.py", b"x = 1\0", "base.py: not Python"),
        ],
    )
    def test_a_file_that_is_no_python_is_one_line(self, files, name, content, message):
        (files.root / "tensorrt_llm" / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            assert files.version is None
            self.check(files, path="LLM.run")
        assert "\n" not in str(caught.value)

    def test_another_folder_is_one_line(self, tmp_path):
        with pytest.raises(ConfigError, match=r"no source of TensorRT-LLM .expected a folder that holds tensorrt_llm/"):
            SourceTree(tmp_path)


class TestCommand:
    def test_fits_and_does_not(self, tree):
        folder, _ = tree
        result = CliRunner().invoke(app, ["doctor", "--source", str(folder)])
        assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "This TensorRT-LLM fits.")
        edit(folder, GPT_OSS, "self.sinks", "self.sink")
        result = CliRunner().invoke(app, ["doctor", "--source", str(folder)])
        assert result.exit_code == 1
        assert result.stdout.splitlines()[-1].startswith("This TensorRT-LLM does not fit: source window-set")

    @pytest.mark.parametrize(
        ("options", "message"),
        [(["--line", "1.2"], "--line: goes with --source"), (["--engine", "x", "--source", "y"], "installed")],
    )
    def test_options_that_do_not_go_together(self, options, message):
        result = CliRunner().invoke(app, ["doctor", *options])
        assert result.exit_code == 2 and message in result.output
