"""Expert importance: the election against a naive one, the file against what the routers really did, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner

import puzzle_trtllm
from puzzle_trtllm.calibration import experts
from puzzle_trtllm.calibration.dataset import load_dataset
from puzzle_trtllm.calibration.expert_choices import observe_choices
from puzzle_trtllm.calibration.expert_scores import REMOVALS, SCORES, importance, one_shot
from puzzle_trtllm.calibration.experts import calibrate_experts
from puzzle_trtllm.calibration.forward import run_dataset
from puzzle_trtllm.calibration.ranked_choice import elimination_order, importance_from_order
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.cli import app
from puzzle_trtllm.errors import CalibrationError, PuzzleError
from puzzle_trtllm.models.huggingface.loading import load_causal_lm

BLOCKS = [(6, 5), (8, None), (3, 9)]


def naive_order(rankings: list[list[int]], top_k: int) -> list[int]:
    """The rule read aloud: count each token's first k among those that remain, drop the fewest, start over."""
    remaining = set(range(len(rankings[0])))
    order = []
    while remaining:
        votes = dict.fromkeys(remaining, 0)
        for ranking in rankings:
            for expert in [e for e in ranking if e in remaining][:top_k]:
                votes[expert] += 1
        dropped = min(remaining, key=lambda e: (votes[e], -e))
        order.append(dropped)
        remaining.remove(dropped)
    return order


@st.composite
def elections(draw):
    num_experts = draw(st.integers(1, 9))
    rankings = draw(st.lists(st.permutations(range(num_experts)), min_size=1, max_size=30))
    return rankings, draw(st.integers(1, num_experts))


@settings(deadline=None)
@given(elections())
def test_the_election_equals_a_naive_one(election):
    rankings, top_k = election
    found = elimination_order(np.array(rankings, dtype=np.uint8), top_k)
    assert found.tolist() == naive_order(rankings, top_k)


def test_votes_go_to_the_next_choice():
    # First choices: 4 for expert 0, 3 for 1, 2 for 2. Counting once keeps {0, 1}. But whoever wants 2 wants 1 next and
    # never 0: after 2 is dropped its votes make 1 the most popular (5 against 4).
    rankings = np.array([[0, 2, 1]] * 4 + [[1, 2, 0]] * 3 + [[2, 1, 0]] * 2, dtype=np.uint8)
    assert elimination_order(rankings, 1).tolist() == [2, 0, 1]


def test_an_expert_that_is_never_routed_goes_first():
    # expert 1 is everyone's second choice and nobody's first
    rankings = np.array([[0, 1, 2]] * 5 + [[2, 1, 0]], dtype=np.uint8)
    assert elimination_order(rankings, 1).tolist()[0] == 1


def test_ties_keep_the_lower_index():
    rankings = np.array([[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]], dtype=np.uint8)
    assert elimination_order(rankings, 1).tolist()[0] == 3


def test_importance_is_the_step_of_dropping():
    assert importance_from_order(np.array([2, 0, 1])).tolist() == [1.0, 2.0, 0.0]


def test_of_equally_unimportant_experts_the_report_names_the_one_that_goes_first():
    layer = experts.LayerImportance(
        importance=np.array([0.0, 2.0, 0.0, 1.0], np.float32),
        scores={"votes": np.array([0.0, 7.0, 0.0, 3.0], np.float32)},
        kept=None,
        relative_error=None,
        share_out_of_choices=None,
    )
    assert (layer.least_important, layer.never_routed, layer.votes) == (2, (0, 2), (0, 7, 0, 3))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(make_checkpoint) -> Path:
    folder = make_checkpoint(BLOCKS, seed=5)
    rng = np.random.default_rng(0)
    lines = [json.dumps({"input_ids": rng.integers(7, 90, 5 + i % 7).tolist()}) for i in range(40)]
    (folder / "calibration.jsonl").write_text("\n".join(lines))
    return folder


@torch.no_grad()
def test_rankings_are_the_routers_own(folder):
    source = Checkpoint.open(folder)
    data, model = load_dataset(None, source), load_causal_lm(source)
    layers = observe_choices(model, lambda m: run_dataset(m, data, what="routing"), [3, 3, 3])
    outputs = [model.model(torch.from_numpy(ids), output_router_logits=True) for ids in data.batches(8192)]
    for layer, (num_experts, _) in enumerate(BLOCKS):
        logits = torch.cat([output.router_logits[layer] for output in outputs])
        ranking = layers[layer].ranking
        assert ranking.shape == (data.num_tokens, num_experts)
        assert ranking.dtype == np.uint8
        assert torch.equal(torch.from_numpy(ranking[:, :2]).long(), logits.topk(2).indices)
        torch.testing.assert_close(torch.from_numpy(layers[layer].logits), logits.topk(3).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("score", SCORES)
def test_the_importance_file(folder, tmp_path, score, removal):
    report = calibrate_experts(folder, tmp_path / "importance.safetensors", score=score, removal=removal, choices=4)
    source = Checkpoint.open(folder)
    data = load_dataset(None, source)
    with torch.no_grad():
        layers = observe_choices(load_causal_lm(source), lambda m: run_dataset(m, data, what="again"), [4, 4, 3])
    with safe_open(report.out, "numpy") as file:
        for i, layer in enumerate(layers):
            found = file.get_tensor(f"model.layers.{i}.mlp.experts.importance")
            assert found.dtype == np.float32
            assert np.array_equal(found, importance(layer, score, removal))
            for other in SCORES:
                values = file.get_tensor(f"model.layers.{i}.mlp.experts.score.{other.replace('-', '_')}")
                assert np.array_equal(values, one_shot(layer, other).astype(np.float32))
        assert len(list(file.keys())) == 3 * (1 + len(SCORES))
        assert file.metadata() == {
            "method": f"{score}, {removal}",
            "choices": "4 4 3",
            "dataset": str(folder / "calibration.jsonl"),
            "dataset_fingerprint": data.fingerprint,
            "parent_fingerprint": source.fingerprint(),
            "num_tokens": str(data.num_tokens),
            "tool_version": puzzle_trtllm.__version__,
        }
    assert [sum(layer.votes) for layer in report.layers] == [2 * data.num_tokens] * 3
    assert report.num_sequences == 40


def test_votes_are_the_election(folder, tmp_path):
    report = calibrate_experts(folder, tmp_path / "i.safetensors", score="votes", removal="iterative")
    source = Checkpoint.open(folder)
    data = load_dataset(None, source)
    with torch.no_grad():
        layers = observe_choices(load_causal_lm(source), lambda m: run_dataset(m, data, what="again"), [2, 2, 2])
    for found, layer in zip(report.layers, layers, strict=True):
        assert np.argsort(found.importance).tolist() == naive_order(layer.ranking.tolist(), 2)


def test_how_many_choices_are_observed(folder, tmp_path):
    """k = 2 of 6, 8 and 3 experts: the next one for scores that need no more, up to 2 k where tokens are followed."""
    architecture = tmp_path / "child.json"
    blocks = [{"num_local_experts": n, "sliding_window": None} for n in (6, 5, 2)]
    architecture.write_text(json.dumps({"block_configs": blocks}))

    def choices(**options) -> tuple[int, ...]:
        out = tmp_path / "i.safetensors"
        return calibrate_experts(folder, out, max_samples=2, overwrite=True, **options).num_choices

    assert choices(score="output-error", removal="one-shot") == (3, 3, 3)
    assert choices(score="votes", removal="iterative") == (3, 3, 3)
    assert choices(score="output-error", removal="iterative") == (4, 4, 3)
    assert choices(score="reap", removal="iterative", architecture=architecture) == (3, 4, 3)
    assert choices(score="reap", removal="iterative", choices=7) == (6, 7, 3)


def test_the_report_says_what_the_childs_counts_cost(folder, tmp_path):
    architecture = tmp_path / "child.json"
    blocks = [{"num_local_experts": n, "sliding_window": None} for n in (6, 5, 2)]
    architecture.write_text(json.dumps({"block_configs": blocks}))
    report = calibrate_experts(folder, tmp_path / "i.safetensors", architecture=architecture, choices=8)
    assert [layer.kept for layer in report.layers] == [6, 5, 2]
    assert report.layers[0].relative_error == 0
    assert all(0.01 < layer.relative_error < 1 for layer in report.layers[1:])
    assert all(layer.share_out_of_choices == 0 for layer in report.layers)
    assert calibrate_experts(folder, tmp_path / "j.safetensors").layers[0].relative_error is None


def test_what_is_written_is_what_derive_reads(folder, tmp_path):
    from puzzle_trtllm.build.importance import read_importance

    calibrate_experts(folder, tmp_path / "importance.safetensors")
    found = read_importance(tmp_path / "importance.safetensors", Checkpoint.open(folder))
    assert not found.warnings
    assert [len(scores) for scores in found.scores] == [6, 8, 3]


def test_a_silenced_expert_is_the_first_to_go(make_checkpoint, tmp_path, folder):
    silenced = make_checkpoint(BLOCKS, seed=5)
    (silenced / "calibration.jsonl").write_bytes((folder / "calibration.jsonl").read_bytes())
    entry = Checkpoint.open(silenced).entry("model.layers.1.mlp.router.bias")
    overwrite_bf16(entry, index=4, value=-1000.0)
    report = calibrate_experts(silenced, tmp_path / "importance.safetensors")
    assert report.layers[1].never_routed == (4,)
    with safe_open(report.out, "numpy") as file:
        assert file.get_tensor("model.layers.1.mlp.experts.importance")[4] == 0.0


def overwrite_bf16(entry, *, index: int, value: float) -> None:
    """Change one BF16 number of a checkpoint in place."""
    bits = np.array([value], dtype=np.float32).view(np.uint32) >> 16
    with entry.file.open("r+b") as stream:
        stream.seek(entry.offset + 2 * index)
        stream.write(bits.astype("<u2").tobytes())


def test_an_existing_file_is_kept(folder, tmp_path):
    out = tmp_path / "importance.safetensors"
    out.write_text("mine")
    with pytest.raises(CalibrationError, match="exists"):
        calibrate_experts(folder, out)
    assert out.read_text() == "mine"
    calibrate_experts(folder, out, overwrite=True)
    assert out.stat().st_size > 100


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("checkpoint/importance.safetensors", "would lie among the files of the checkpoint"),
        ("a-folder", "cannot be written: Is a directory"),
        ("a-file/importance.safetensors", "cannot be written: Not a directory"),
    ],
)
def test_a_place_that_will_not_do_is_told_before_the_pass(folder, tmp_path, monkeypatch, place, message):
    monkeypatch.setattr(experts, "load_chosen", Mock(side_effect=AssertionError("too late")))
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "a-file").touch()
    (tmp_path / "checkpoint").symlink_to(folder)
    with pytest.raises(PuzzleError, match=message):
        calibrate_experts(folder, tmp_path / place, overwrite=True)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_activations_that_are_not_finite_name_the_layer(make_checkpoint, folder, tmp_path, value):
    broken = make_checkpoint(BLOCKS, seed=5)
    (broken / "calibration.jsonl").write_bytes((folder / "calibration.jsonl").read_bytes())
    overwrite_bf16(Checkpoint.open(broken).entry("model.layers.1.self_attn.o_proj.bias"), index=0, value=value)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1.*not finite"):
        calibrate_experts(broken, tmp_path / "importance.safetensors")
    assert not (tmp_path / "importance.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--score", "output"], "score: unknown (found output, expected votes, output-error, router-mass, reap)"),
        (["--score", ""], "--score: is empty"),
        (["--removal", ""], "--removal: is empty"),
        (["--removal", "greedy"], "removal: unknown (found greedy, expected one-shot, iterative)"),
        (["--choices", "2"], "choices: too few (found 2, expected at least 3 "),
        (["--architecture", "{folder}/config.json"], ""),
        (["--architecture", "{folder}/calibration.jsonl"], "calibration.jsonl: "),
        (["--dataset", "{folder}/none.jsonl"], "none.jsonl: missing"),
        (["--effort", "max"], "efforts: unknown reasoning effort"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(folder, tmp_path, options, message):
    command = ["calibrate", "experts", str(folder), str(tmp_path / "i.safetensors"), "--json"]
    result = CliRunner().invoke(app, [*command, *(option.format(folder=folder) for option in options)])
    if not message:  # a whole config.json is an architecture, and the parent's own keeps everyone
        assert result.exit_code == 0
        assert [layer["kept"] for layer in json.loads(result.stdout)["layers"]] == [6, 8, 3]
        return
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_next_command_is_shown_in_one_piece(folder, tmp_path, monkeypatch):
    """As wide as the table of experts it broke before the file's name."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["calibrate", "experts", str(folder), "scores of experts.safetensors"])
    command = "puzzle-trtllm derive PARENT CHILD --architecture child.json --importance 'scores of experts.safetensors'"
    assert result.exit_code == 0 and command in result.stdout
