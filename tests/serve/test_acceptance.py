"""Acceptance: recorded on real engines of the reference runtime, compared by hand-made recordings."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import BenchError, ConfigError
from puzzle_trtllm.serve.acceptance import recording as recording_module
from puzzle_trtllm.serve.acceptance.__main__ import main
from puzzle_trtllm.serve.acceptance.comparison import Agreement, common_tokens, compare
from puzzle_trtllm.serve.acceptance.recording import Continuation, Recording, record, synthetic_prompts
from puzzle_trtllm.serve.acceptance.slicing import slice_layers

BLOCKS = [(4, 16), (2, None), (4, 40)]


def recording(texts, logprobs, **changes):
    continuations = [
        Continuation(prompt_tokens=16, token_ids=list(text), first_logprob=logprob)
        for text, logprob in zip(texts, logprobs, strict=True)
    ]
    values = {"engine": "e", "runtime": "reference", "kv_dtype": "bf16", "kv_fold": "none", "max_tokens": 3}
    return Recording(**{**values, "prompts_fingerprint": "f", "continuations": continuations, **changes})


@pytest.fixture(scope="module")
def engines(make_checkpoint, tmp_path_factory):
    """One child, its KV cache in BF16, in folded FP8, and another child."""
    folder = tmp_path_factory.mktemp("engines")
    scenario = folder / "tiny.yaml"
    scenario.write_text("name: tiny\ninput_tokens: 60\noutput_tokens: 20\nconcurrency: 1\nnum_requests: 1\n")
    child = make_checkpoint(BLOCKS, kv_scales=[(2.0**-6, 2.0**-6)] * 3)
    built = {}
    for name, checkpoint, kv_dtype in (
        ("bf16", child, "bf16"),
        ("fp8", child, "fp8"),
        ("other", make_checkpoint(BLOCKS, seed=7), "bf16"),
    ):
        config = EngineConfig(runtime="reference", kv_dtype=kv_dtype, scenario=str(scenario))
        built[name] = build_engine(checkpoint, folder / name, config=config).path
    return built


def test_an_engine_agrees_with_itself_and_not_with_another(engines, tmp_path, capsys):
    for name in ("bf16", "fp8", "other"):
        assert main(["record", str(engines[name]), str(tmp_path / f"{name}.json"), "--max-tokens", "4"]) == 0
    one = Recording.load(tmp_path / "bf16.json")
    assert (one.runtime, one.kv_fold, one.max_tokens) == ("reference", "none", 4)
    assert all(len(c.token_ids) == 4 and c.first_logprob < 0 for c in one.continuations)
    assert {c.prompt_tokens for c in one.continuations} == {16, 21, 51}  # beyond 16 and beyond 40
    files = {name: str(tmp_path / f"{name}.json") for name in engines}
    assert record(engines["bf16"], max_tokens=4) == one
    assert main(["compare", files["bf16"], files["bf16"]]) == 0
    assert main(["compare", files["bf16"], files["other"]]) == 1
    capsys.readouterr()
    main(["compare", files["bf16"], files["fp8"]])
    out = capsys.readouterr().out
    assert "accepted (asked for: 95% equal first tokens, log-probabilities within 0.25)" in out
    lengths = [line.split("|")[0].strip() for line in out.splitlines() if "|" in line][1:]
    assert lengths == [*sorted(lengths[:-1], key=int), "all"]
    found = compare(one, Recording.load(files["fp8"]))["all"]
    assert found.max_logprob_difference is not None and 0 < found.max_logprob_difference < 1  # rounding, and only that


def test_agreement_by_hand():
    a = recording([[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]], [-1.0, -2.0, -3.0, None])
    b = recording([[1, 2, 3], [4, 5, 0], [0, 8, 9], [1, 1, 1]], [-1.25, -2.0, -9.0, -1.0])
    found = compare(a, b)["all"]
    assert (found.num_prompts, found.same_first_token, found.same_text) == (4, 0.75, 0.5)
    assert found.mean_common_tokens == (3 + 2 + 0 + 3) / 4
    assert (
        found.max_logprob_difference == 0.25
    )  # the third prompt's first tokens differ, the fourth has only one number
    assert found.accepted(min_first_token=0.75, max_logprob_difference=0.25)
    assert not found.accepted(min_first_token=0.76, max_logprob_difference=0.25)
    assert not found.accepted(min_first_token=0.75, max_logprob_difference=0.24)


def test_groups_by_length_and_common_tokens():
    assert list(compare(recording([[1]], [None]), recording([[1]], [None]))) == ["16", "all"]
    assert common_tokens([1, 2], [1, 2, 3]) == 2 and common_tokens([], [1]) == 0


@pytest.mark.parametrize("change", [{"prompts_fingerprint": "g"}, {"max_tokens": 4}])
def test_recordings_of_different_questions_are_refused(change):
    with pytest.raises(BenchError, match=rf"{next(iter(change))}: recordings of different questions"):
        compare(recording([[1]], [None]), recording([[1]], [None], **change))


def test_recordings_of_unequal_length_are_refused():
    with pytest.raises(BenchError, match=r"continuations: recordings of different questions \(found 2, expected 1\)"):
        compare(recording([[1]], [None]), recording([[1], [2]], [None, None]))


def test_prompts_cross_every_window_that_fits_and_hold_no_control_tokens():
    prompts = synthetic_prompts((128, 8192, None), vocab_size=201088, max_prompt_tokens=8000)
    assert sorted({len(prompt) for prompt in prompts}) == [16, 161]
    assert max(max(prompt) for prompt in prompts) < 199_998
    assert prompts == synthetic_prompts((128, 8192, None), vocab_size=201088, max_prompt_tokens=8000)
    assert {len(p) for p in synthetic_prompts((128, 8192), vocab_size=96, max_prompt_tokens=20000)} == {16, 161, 10241}


def test_the_users_errors(engines, tmp_path, capsys):
    with pytest.raises(BenchError, match=r"max_tokens: leaves no room for a prompt \(found 80, expected below 80"):
        record(engines["bf16"], max_tokens=80)
    (tmp_path / "x.json").write_text('{"engine": 3}')
    with pytest.raises(ConfigError, match=r"x\.json: engine: not a recording"):
        Recording.load(tmp_path / "x.json")
    assert main(["compare", str(tmp_path / "no.json"), "b"]) == 2
    assert "no.json: cannot be read" in capsys.readouterr().err


def test_a_difference_that_is_no_number_is_not_accepted():
    nan = Agreement(
        num_prompts=1, same_first_token=1, same_text=1, mean_common_tokens=1, max_logprob_difference=float("nan")
    )
    assert not nan.accepted(min_first_token=0.95, max_logprob_difference=0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": []}, r"a\.json: continuations\.0\.token_ids: not a recording: .* at least 1 item"),
        ({"prompt_tokens": True}, r"a\.json: continuations\.0\.prompt_tokens: not a recording: .* valid integer"),
        ({"first_logprob": float("nan")}, r"a\.json: continuations\.0\.first_logprob: not a recording: .* finite"),
        (None, r"a\.json: continuations: not a recording: .* at least 1 item"),
    ],
)
def test_a_recording_that_says_nothing_is_none(tmp_path, change, message):
    content = json.loads(recording([[1]], [-1.0]).model_dump_json())
    content["continuations"] = [] if change is None else [content["continuations"][0] | change]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        Recording.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("token_ids", "logprob", "message"),
    [
        ([1], float("nan"), r"log-probability after 2 tokens: no finite number \(found nan\)"),
        ([1], float("-inf"), "no finite number"),
        ([], None, "prompt of 2 tokens: the engine gave no token"),
    ],
)
def test_an_engine_that_says_nothing_is_not_recorded(engines, monkeypatch, token_ids, logprob, message):
    output = SimpleNamespace(token_ids=token_ids, cumulative_logprob=logprob)
    llm = SimpleNamespace(
        generate=lambda *_: SimpleNamespace(outputs=[output]),
        tokenizer=SimpleNamespace(encode=lambda text: [3, 4]),
        shutdown=lambda: None,
    )
    monkeypatch.setattr(recording_module, "create_llm", lambda engine: llm)
    with pytest.raises(BenchError, match=message):
        record(engines["bf16"], texts=["a"], max_tokens=4)
    with pytest.raises(BenchError, match="no prompt to continue"):
        record(engines["bf16"], texts=[], max_tokens=4)


def test_an_engine_without_a_tokenizer_is_told_what_the_end_is(engines, tmp_path, monkeypatch):
    """TensorRT-LLM refuses every request otherwise, also one that ignores the end."""
    asked = []
    output = SimpleNamespace(token_ids=[1], cumulative_logprob=-1.0)
    llm = SimpleNamespace(
        generate=lambda _, params: asked.append(params) or SimpleNamespace(outputs=[output]), shutdown=lambda: None
    )
    engine = shutil.copytree(engines["bf16"], tmp_path / "engine")
    (engine / "model" / "tokenizer.json").unlink()
    end = json.loads((engine / "model" / "config.json").read_text())["eos_token_id"]
    monkeypatch.setattr(recording_module, "create_llm", lambda engine: llm)
    record(engine, max_tokens=4)
    assert asked and all((params.end_id, params.ignore_eos) == (end, True) for params in asked)


def test_an_output_that_cannot_be_written_is_refused_before_the_engine_starts(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["record", str(tmp_path / "no-engine"), str(tmp_path / "file" / "a.json")]) == 2
    assert "a.json: cannot be written: Not a directory" in capsys.readouterr().err
    assert main(["record", str(tmp_path / "no-engine"), str(tmp_path)]) == 2
    assert "cannot be written: Is a directory" in capsys.readouterr().err


def test_a_recording_is_saved_into_a_new_folder_and_read_back(tmp_path):
    made = recording([[1]], [-1.0])
    made.save(tmp_path / "new" / "a.json")
    assert Recording.load(tmp_path / "new" / "a.json") == made
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"b\.json: not UTF-8 text"):
        Recording.load(tmp_path / "b.json")


class TestSlice:
    def test_layers_keep_their_bytes_under_new_numbers(self, make_checkpoint, tmp_path, capsys):
        folder = make_checkpoint([*BLOCKS, (2, 16)], kv_scales=[(2.0**-i, 2.0**-i) for i in range(4)])
        assert main(["slice", str(folder), str(tmp_path / "out"), "--layers", "3,1"]) == 0
        assert "2 layers of 2, 2 experts" in capsys.readouterr().out
        source, made = Checkpoint.open(folder), Checkpoint.open(tmp_path / "out")
        assert made.architecture.blocks == (source.architecture.blocks[3], source.architecture.blocks[1])
        for name in made.tensors:
            original = name.replace("layers.1.", "layers.x.").replace("layers.0.", "layers.3.").replace("x.", "1.")
            assert (made.raw(name) == source.raw(original)).all()
        assert {layer for layer, _ in made.kv_scales} == {0, 1}

    def test_an_engine_can_be_built_from_it(self, make_checkpoint, tmp_path):
        folder = make_checkpoint([*BLOCKS, (2, 16)], kv_scales=[(0.5, 0.5)] * 4)
        slice_layers(folder, tmp_path / "slice", [0, 2])
        config = EngineConfig(runtime="reference", kv_dtype="fp8", scenario="cpu-demo", memory_bytes=None)
        engine = build_engine(tmp_path / "slice", tmp_path / "engine", config=config)
        assert [block.num_local_experts for block in engine.architecture.blocks] == [4, 4]

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ("0,9", "not layers of this checkpoint .found 0,9, expected different numbers from 0 to 2"),
            ("1,1", "found 1,1"),
            ("0-3", "--layers: not layer numbers .found 0-3"),
        ],
    )
    def test_wrong_layers_are_one_line_and_leave_nothing(self, make_checkpoint, tmp_path, capsys, layers, message):
        assert main(["slice", str(make_checkpoint(BLOCKS)), str(tmp_path / "out"), "--layers", layers]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "out").exists()
