"""The shipped parent model: the released format, the numbers of transformers, the accuracy that its card states."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puzzle_trtllm import mxfp4
from puzzle_trtllm.demo import problems
from puzzle_trtllm.serve.evaluate.problems import load_problems

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402

from puzzle_trtllm.demo.training import checkpoint, data, evaluate, heldout, rounding, vocabulary  # noqa: E402
from puzzle_trtllm.demo.training.generate import generate  # noqa: E402
from puzzle_trtllm.demo.training.model import Abacus, Conditions  # noqa: E402
from puzzle_trtllm.demo.training.pruning import choose_dropped, elimination_order  # noqa: E402
from puzzle_trtllm.demo.training.schedule import choose_disposable  # noqa: E402

FOLDER = Path(problems.__file__).parent / "abacus"
SEED = 0


@pytest.fixture(scope="module")
def abacus() -> Abacus:
    return checkpoint.load(FOLDER)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' gpt-oss with the MXFP4 experts expanded, in float32."""
    quantization = transformers.Mxfp4Config(dequantize=True)
    model = transformers.GptOssForCausalLM.from_pretrained(
        FOLDER, dtype=torch.bfloat16, quantization_config=quantization, attn_implementation="eager"
    )
    return model.float().eval()


def calibration() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / "calibration.jsonl").read_text().splitlines()]


def test_experts_have_a_shard_of_their_own_and_the_index_is_true() -> None:
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())["weight_map"]
    held: dict[str, str] = {}
    for path in FOLDER.glob("*.safetensors"):
        with safe_open(path, "np") as shard:
            names = list(shard.keys())
        assert len({"mlp.experts." in name for name in names}) == 1
        assert not held.keys() & names
        held |= dict.fromkeys(names, path.name)
    assert held == index


def test_tensors_have_the_released_dtypes_and_shapes() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    experts, hidden, width = (config[k] for k in ("num_local_experts", "hidden_size", "intermediate_size"))
    expected = {
        "gate_up_proj_blocks": ("U8", [experts, 2 * width, hidden // 32, 16]),
        "gate_up_proj_scales": ("U8", [experts, 2 * width, hidden // 32]),
        "gate_up_proj_bias": ("BF16", [experts, 2 * width]),
        "down_proj_blocks": ("U8", [experts, hidden, width // 32, 16]),
        "down_proj_scales": ("U8", [experts, hidden, width // 32]),
        "down_proj_bias": ("BF16", [experts, hidden]),
    }
    for path in FOLDER.glob("*.safetensors"):
        with safe_open(path, "np") as shard:
            for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                found = shard.get_slice(name)
                if "mlp.experts." in name:
                    assert (found.get_dtype(), found.get_shape()) == expected[name.rsplit(".", 1)[1]]
                else:
                    assert found.get_dtype() == "BF16"


def test_the_child_architecture_has_three_kinds_of_window_and_uneven_experts() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    blocks = json.loads((FOLDER / "child_architecture.json").read_text())["block_configs"]
    assert len(blocks) == config["num_hidden_layers"]
    assert len({block["sliding_window"] for block in blocks}) >= 3
    assert None in {block["sliding_window"] for block in blocks}
    counts = [block["num_local_experts"] for block in blocks]
    assert len(set(counts)) >= 3
    assert all(config["num_experts_per_tok"] <= n <= config["num_local_experts"] for n in counts)


def test_shipped_problems_are_right_distinct_and_held_out() -> None:
    shipped = load_problems(FOLDER / "problems.jsonl").problems
    assert len({p.prompt for p in shipped}) == len({p.id for p in shipped}) == len(shipped) >= 200
    for problem in shipped:
        a, b = map(int, re.findall(r"\d+", problem.prompt))
        assert problem.answer == str(a + b)
        assert problems.split_of(a, b) == "problems"


def test_calibration_records_are_held_out_and_cover_the_efforts() -> None:
    records = calibration()
    assert {record["reasoning_effort"] for record in records} == set(problems.EFFORTS)
    for record in records:
        a, b = map(int, re.findall(r"\d+", record["messages"][0]["content"]))
        assert problems.split_of(a, b) == "calibration"


def test_shipped_data_is_what_the_script_writes(tmp_path: Path) -> None:
    heldout.write(tmp_path, SEED)
    for name in ("problems.jsonl", "calibration.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.parametrize("text", ["4821+967=", "<|start|>user<|message|>hi\nsystem<|end|>", "effort: low é final42"])
def test_the_tokenizer_file_and_the_training_code_agree(tokenizer: Any, text: str) -> None:
    assert tokenizer(text)["input_ids"] == vocabulary.encode(text)


def test_tokens_decode_to_the_text_they_came_from(tokenizer: Any) -> None:
    text = vocabulary.prompt("48213+90677=", "high") + vocabulary.completion("3+7=10", "138890")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_renders_what_the_model_was_trained_on(tokenizer: Any) -> None:
    for record in calibration()[:3]:
        a, b = map(int, re.findall(r"\d+", record["messages"][0]["content"]))
        effort = record["reasoning_effort"]
        rendered = tokenizer.apply_chat_template(record["messages"], tokenize=False, reasoning_effort=effort)
        assert vocabulary.encode(rendered) == data.example(a, b, effort)[0]
        assert rendered == evaluate.conversation(record)
        prompt = tokenizer.apply_chat_template(
            record["messages"][:1], tokenize=False, reasoning_effort=effort, add_generation_prompt=True
        )
        assert rendered.startswith(prompt)


def test_the_chat_template_refuses_an_unknown_effort(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="reasoning_effort must be low, medium or high"):
        tokenizer.apply_chat_template([{"role": "user", "content": "1+1="}], reasoning_effort="extreme")


def test_logits_equal_those_of_transformers(abacus: Abacus, reference: Any) -> None:
    for record in calibration()[:6]:
        tokens = torch.tensor([vocabulary.encode(evaluate.conversation(record))])
        with torch.inference_mode():
            ours = abacus(tokens, Conditions(windows=abacus.dims.windows))
            theirs = reference(tokens).logits
        assert (ours - theirs).abs().max() < 1e-3
        assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.mark.parametrize("effort", problems.EFFORTS)
def test_transformers_writes_the_same_tokens(abacus: Abacus, reference: Any, effort: str) -> None:
    """Four held-out problems of one length, to the end: the card's accuracy is transformers' too."""
    shipped = [p for p in load_problems(FOLDER / "problems.jsonl").problems if len(p.prompt) == len("1234567+1234567=")]
    prompts = [vocabulary.encode(vocabulary.prompt(problem.prompt, effort)) for problem in shipped[:4]]
    ours = generate(abacus, prompts, Conditions(windows=abacus.dims.windows))
    output = reference.generate(torch.tensor(prompts), max_new_tokens=200, do_sample=False)
    for written, row in zip(ours, output[:, len(prompts[0]) :].tolist(), strict=True):
        assert row[: len(written)] == written


def test_accuracy_and_tokens_rise_with_effort(abacus: Abacus) -> None:
    """Bounds are wide: 48 of the held-out problems; the model card has the full numbers."""
    sample = load_problems(FOLDER / "problems.jsonl").problems[:48]
    parent = Conditions(windows=abacus.dims.windows)
    low, medium, high = (evaluate.score(abacus, sample, effort, parent) for effort in problems.EFFORTS)
    assert 0.05 <= low.accuracy <= 0.7
    assert medium.accuracy >= low.accuracy + 0.2
    assert high.accuracy >= 0.9
    assert low.mean_output_tokens < medium.mean_output_tokens / 3 < high.mean_output_tokens / 3 / 1.5


def test_votes_on_real_conversations_find_the_disposable_experts(abacus: Abacus) -> None:
    """The oracle is the training schedule, which knows which experts it kept away."""
    dims = abacus.dims
    routing = evaluate.collect_routing(abacus, calibration()[:60])
    careful = choose_dropped("careful", routing, dims.child_experts, dims.top_k, SEED)
    assert torch.equal(careful, choose_disposable(dims, SEED))


def test_careful_pruning_needs_no_healing_and_careless_pruning_hurts(abacus: Abacus) -> None:
    shipped = load_problems(FOLDER / "problems.jsonl").problems
    sample = [problem for problem in shipped if len(problem.prompt) == len("123456+123456=")][:16]  # one batch
    variants = evaluate.variants(abacus, evaluate.collect_routing(abacus, calibration()[:60]))
    accuracy = {
        name: evaluate.score(abacus, sample, "high", variants[name]).accuracy
        for name in ("child (careful)", "most used dropped", "random experts, seed 0", "no full layer")
    }
    assert accuracy["child (careful)"] >= 0.85
    assert accuracy["most used dropped"] <= 0.5
    assert accuracy["random experts, seed 0"] <= 0.7
    assert accuracy["no full layer"] <= 0.5


def test_stored_values_are_what_the_model_computed_with(abacus: Abacus) -> None:
    """Rounding a loaded weight again changes nothing, so nothing was lost between training and file."""
    for name, parameter in abacus.state_dict().items():
        quantized = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        again = rounding.mxfp4(parameter) if quantized else rounding.bfloat16(parameter)
        assert torch.equal(again, parameter)


def test_the_training_rounding_equals_the_storage_format() -> None:
    """Random blocks over many exponents, and every multiple of 1/16 in a block (all ties among them)."""
    generator = torch.Generator().manual_seed(1)
    wild = torch.randn(64, 96, generator=generator) * torch.randn(64, 1, generator=generator).mul(8).exp2()
    grid = torch.cat([torch.arange(-128, 128) / 16, torch.zeros(32)]).view(9, 32)
    for values in (wild, grid.clamp(-7.9, 7.9)):
        stored = mxfp4.dequantize(*mxfp4.quantize(values.numpy()))
        np.testing.assert_array_equal(rounding.mxfp4(values).numpy(), stored)


def test_ranked_choice_voting_passes_a_losers_votes_on() -> None:
    """Four tokens, top 1: expert 2 leads, 1 has one vote that goes to 0 when 1 leaves; 3 is never chosen."""
    logits = torch.tensor([[3.0, 0, 1, 2], [2.0, 3, 1, 0], [0.0, 1, 3, 2], [0.0, 1, 3, 2]])
    assert elimination_order(logits, 1)[:2] == [3, 1]
