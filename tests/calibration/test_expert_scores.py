"""The scores against brute force: experts really removed from a layer, and the layer run again."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from puzzle_trtllm.calibration import expert_scores
from puzzle_trtllm.calibration.expert_choices import TokenChoices, observe_choices
from puzzle_trtllm.calibration.expert_scores import (
    SCORES,
    importance,
    one_shot,
    relative_error,
    removal_order,
    share_out_of_choices,
)
from puzzle_trtllm.errors import CalibrationError
from puzzle_trtllm.models.huggingface.loading import load_causal_lm

NUM_EXPERTS, TOP_K, NUM_TOKENS, HIDDEN = 7, 2, 400, 64


@dataclass
class Layer:
    """One layer's transformers MLP, the tokens that reach it, and what it gives for them."""

    mlp: Any
    tokens_TD: torch.Tensor
    output_TD: torch.Tensor
    choices: TokenChoices
    """With every expert observed."""

    def without(self, removed: set[int]) -> torch.Tensor:
        """The output `[T, D]` of the layer from which these experts' weights and router rows have been cut."""
        kept = torch.tensor([expert for expert in range(NUM_EXPERTS) if expert not in removed])
        smaller = copy.deepcopy(self.mlp)
        for module in (smaller.router, smaller.experts):
            module.num_experts = len(kept)
            for name, parameter in list(module.named_parameters()):
                setattr(module, name, torch.nn.Parameter(parameter[kept]))
        smaller.router.top_k = min(TOP_K, len(kept))
        return smaller(self.tokens_TD[None])[0][0]

    def squared_error(self, removed: set[int]) -> float:
        difference = (self.output_TD - self.without(removed)).double()
        return float(difference.square().sum())


@pytest.fixture(scope="module")
def model(make_checkpoint) -> Any:
    return load_causal_lm(make_checkpoint([(NUM_EXPERTS, None)], seed=11, experts_per_token=TOP_K, hidden_size=HIDDEN))


@pytest.fixture(scope="module")
@torch.no_grad()
def layer(model) -> Layer:
    mlp = model.model.layers[0].mlp
    tokens_TD = torch.randn(NUM_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))
    tokens_TD += 0.5  # so that some experts are asked more than others
    (choices,) = observe_choices(model, lambda m: m.model.layers[0].mlp(tokens_TD[None]), [NUM_EXPERTS])
    return Layer(mlp=mlp, tokens_TD=tokens_TD, output_TD=mlp(tokens_TD[None])[0][0], choices=choices)


def with_choices(choices: TokenChoices, num_choices: int) -> TokenChoices:
    """As if only the first `num_choices` experts of each token had been run."""
    rows, columns = np.triu_indices(choices.num_choices)
    kept = (rows < num_choices) & (columns < num_choices)
    return TokenChoices(
        ranking=choices.ranking,
        logits=choices.logits[:, :num_choices],
        inner_products=choices.inner_products[:, kept],
        top_k=choices.top_k,
        hidden_size=choices.hidden_size,
    )


# -- one-shot ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_output_error_is_that_of_really_removing_the_expert(layer):
    expected = [layer.squared_error({expert}) / (NUM_TOKENS * HIDDEN) for expert in range(NUM_EXPERTS)]
    assert min(expected) > 1e-4
    np.testing.assert_allclose(one_shot(layer.choices, "output-error"), expected, rtol=1e-4)
    few = with_choices(layer.choices, TOP_K + 1)  # nothing beyond the next expert is needed
    np.testing.assert_allclose(one_shot(few, "output-error"), expected, rtol=1e-4)


@torch.no_grad()
def test_votes_router_mass_and_reap_directly(layer):
    logits_TE = functional.linear(layer.tokens_TD, layer.mlp.router.weight, layer.mlp.router.bias)
    votes, mass = np.zeros(NUM_EXPERTS), np.zeros(NUM_EXPERTS)
    for token, logits in zip(layer.tokens_TD, logits_TE, strict=True):
        top, chosen = logits.topk(TOP_K)
        for expert, weight in zip(chosen.tolist(), top.softmax(0).tolist(), strict=True):
            alone = layer.mlp.experts(token[None], torch.tensor([[expert]]), torch.ones(1, 1))
            votes[expert] += 1
            mass[expert] += weight * float(alone.norm())
    for num_choices in (TOP_K + 1, NUM_EXPERTS):
        choices = with_choices(layer.choices, num_choices)
        np.testing.assert_array_equal(one_shot(choices, "votes"), votes)
        np.testing.assert_allclose(one_shot(choices, "router-mass"), mass / NUM_TOKENS, rtol=1e-5)
        np.testing.assert_allclose(one_shot(choices, "reap"), mass / votes, rtol=1e-5)


@torch.no_grad()
def test_as_many_experts_as_choices_leaves_nobody_to_take_the_place(make_checkpoint):
    model = load_causal_lm(make_checkpoint([(TOP_K, None)], seed=3, experts_per_token=TOP_K))
    mlp, tokens_TD = model.model.layers[0].mlp, torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    (choices,) = observe_choices(model, lambda m: m.model.layers[0].mlp(tokens_TD[None]), [TOP_K])
    whole, ones = mlp(tokens_TD[None])[0][0], torch.ones(50, 1)
    for expert in range(TOP_K):  # with one gone, the other answers alone
        alone = mlp.experts(tokens_TD, torch.full((50, 1), 1 - expert), ones)
        expected = float((whole - alone).double().square().mean())
        assert one_shot(choices, "output-error")[expert] == pytest.approx(expected, rel=1e-4)


# -- iterative ---------------------------------------------------------------------------------------------------------


def naive_order(score_without: Any, removable: int) -> list[int]:
    """Greedy, by the definition: score everyone that remains, drop the lowest, start over."""
    removed: list[int] = []
    while len(removed) < removable:
        remaining = [expert for expert in range(NUM_EXPERTS) if expert not in removed]
        removed.append(min(remaining, key=lambda expert: (score_without(set(removed), expert), -expert)))
    return removed


@torch.no_grad()
def test_iterative_output_error_removes_what_brute_force_removes(layer):
    removable = NUM_EXPERTS - TOP_K
    expected = naive_order(lambda removed, expert: layer.squared_error(removed | {expert}), removable)
    order = removal_order(layer.choices, "output-error").tolist()
    assert order[:removable] == expected
    assert sorted(order) == list(range(NUM_EXPERTS))
    # 2 k choices can differ from that, but here they are enough for the first ones
    assert removal_order(with_choices(layer.choices, 2 * TOP_K), "output-error").tolist()[:TOP_K] == expected[:TOP_K]


@torch.no_grad()
@pytest.mark.parametrize("score", ["router-mass", "reap"])
def test_iterative_mass_routes_tokens_again(layer, score):
    logits_TE = functional.linear(layer.tokens_TD, layer.mlp.router.weight, layer.mlp.router.bias)
    everyone = torch.arange(NUM_EXPERTS).repeat(NUM_TOKENS, 1)
    norms_TE = torch.stack(
        [layer.mlp.experts(layer.tokens_TD, everyone[:, [e]], torch.ones(NUM_TOKENS, 1)).norm(dim=1) for e in range(7)]
    ).T

    def naive(removed: set[int], expert: int) -> float:
        left = logits_TE.clone()
        left[:, list(removed)] = -torch.inf
        top, chosen = left.topk(TOP_K)
        mine_Tk = chosen == expert
        mass = float((top.softmax(-1) * norms_TE.gather(1, chosen))[mine_Tk].sum())
        return mass if score == "router-mass" else mass / max(1, int(mine_Tk.sum()))

    removable = NUM_EXPERTS - TOP_K
    assert removal_order(layer.choices, score).tolist()[:removable] == naive_order(naive, removable)


def test_iterative_removal_sees_that_two_experts_stand_in_for_each_other():
    """Experts 0 and 1 answer alike, and whoever asks one has the other next: one-shot, neither seems to matter. But
    only one of them can go, and then the other is the last."""
    outputs = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.3], [0.0, 0.0]])
    rankings = [[0, 1, 3, 2]] * 6 + [[1, 0, 3, 2]] * 6 + [[2, 3, 0, 1]] * 4 + [[3, 2, 0, 1]]
    choices = choices_of(rankings, outputs, top_k=1)
    assert np.argsort(one_shot(choices, "output-error"), kind="stable").tolist()[:2] == [0, 1]
    order = removal_order(choices, "output-error").tolist()
    assert order[0] == 1
    assert order[-1] == 0


def choices_of(rankings: list[list[int]], outputs_ED: np.ndarray, *, top_k: int) -> TokenChoices:
    """Tokens with these rankings, of equal weights, all of whom get the same answer from an expert."""
    ranking = np.array(rankings, dtype=np.uint8)
    outputs_TED = outputs_ED[ranking]
    rows, columns = np.triu_indices(ranking.shape[1])
    gram = outputs_TED @ outputs_TED.transpose(0, 2, 1)
    return TokenChoices(
        ranking=ranking,
        logits=-np.arange(ranking.shape[1], dtype=np.float32) * np.ones((len(ranking), 1), dtype=np.float32),
        inner_products=gram[:, rows, columns].astype(np.float32),
        top_k=top_k,
        hidden_size=outputs_ED.shape[1],
    )


@st.composite
def layers(draw):
    num_experts = draw(st.integers(2, 6))
    top_k = draw(st.integers(1, num_experts))
    rankings = draw(st.lists(st.permutations(range(num_experts)), min_size=1, max_size=12))
    outputs = np.array(draw(st.lists(st.integers(-3, 3), min_size=2 * num_experts, max_size=2 * num_experts)))
    choices = choices_of(rankings, outputs.reshape(num_experts, 2).astype(float), top_k=top_k)
    return with_choices(choices, draw(st.integers(top_k, num_experts)))


@settings(deadline=None)
@given(layers(), st.sampled_from(SCORES))
def test_whoever_is_never_asked_goes_first(choices, score):
    asked = set(choices.ranking[:, : choices.top_k].ravel().tolist())
    scores = one_shot(choices, score)
    assert all(scores[expert] == 0 for expert in range(choices.num_experts) if expert not in asked)
    assert np.isfinite(scores).all() and (scores >= 0).all()
    order = np.argsort(importance(choices, score, "iterative"), kind="stable").tolist()
    assert sorted(order) == list(range(choices.num_experts))
    first_asked = next((place for place, expert in enumerate(order) if expert in asked), len(order))
    assert first_asked >= min(1, choices.num_experts - len(asked))


def test_one_who_can_be_replaced_at_no_cost_still_goes_after_those_whom_nobody_asks():
    """All answer alike, so that no score is above 0; but the only token asks 2, and 1 and 0 are never routed to."""
    choices = choices_of([[2, 1, 0]], np.full((3, 1), 2.0), top_k=1)
    assert one_shot(choices, "output-error").tolist() == [0, 0, 0]
    assert removal_order(choices, "output-error").tolist() == [1, 0, 2]


@pytest.mark.parametrize("score", SCORES)
def test_scores_do_not_depend_on_how_many_tokens_are_looked_at_at_once(layer, score, monkeypatch):
    def everything() -> list[Any]:
        error = relative_error(layer.choices, [0, 1, 4, 6])
        return [one_shot(layer.choices, score), importance(layer.choices, score, "iterative"), error]

    at_once = everything()
    monkeypatch.setattr(expert_scores, "_TOKENS_AT_ONCE", 7)
    for ours, theirs in zip(everything(), at_once, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("score", SCORES)
def test_what_all_logits_of_a_token_share_does_not_matter(score):
    choices = choices_of([[0, 1, 2], [1, 2, 0], [2, 0, 1]], np.array([[1.0, 0], [2, 1], [0, 5]]), top_k=2)
    shifted = dataclasses.replace(choices, logits=choices.logits - np.float32(2000))
    np.testing.assert_array_equal(one_shot(shifted, score), one_shot(choices, score))
    assert one_shot(choices, score).min() > 0


# -- what a child's counts cost ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_error_of_a_set_is_that_of_the_smaller_layer(layer):
    power = float(layer.output_TD.double().square().sum())
    for removed in itertools.combinations(range(NUM_EXPERTS), 3):
        kept = [expert for expert in range(NUM_EXPERTS) if expert not in removed]
        expected = (layer.squared_error(set(removed)) / power) ** 0.5
        assert relative_error(layer.choices, kept) == pytest.approx(expected, rel=1e-4)
        assert share_out_of_choices(layer.choices, kept) == 0
    assert relative_error(layer.choices, range(NUM_EXPERTS)) == 0
    assert relative_error(choices_of([[0, 1], [1, 0]], np.zeros((2, 2)), top_k=1), [0]) == 0
    few, kept = with_choices(layer.choices, TOP_K + 1), [0, 1, 2]
    gone = (~np.isin(few.chosen, kept)).sum(axis=1)
    assert share_out_of_choices(few, kept) == pytest.approx((gone > 1).mean())


# -- the pass itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_observing_does_not_change_the_model(make_checkpoint, dtype):
    folder, source = make_checkpoint([(6, 5), (8, None), (3, 9)], seed=5), torch.Generator().manual_seed(5)
    model, ids = load_causal_lm(folder, dtype=dtype), torch.randint(7, 90, (3, 40), generator=source)
    plain, observed = model.model(ids).last_hidden_state, []
    observe_choices(model, lambda m: observed.append(m.model(ids).last_hidden_state), [3, 8, 3])
    exact = load_causal_lm(folder).model(ids).last_hidden_state
    # Of a token's error the median: in bfloat16 a router's near tie falls the other way now and then, and such a token
    # is far off, in either pass. Over 30 seeds the ratio of the medians was 0.92 to 1.13.
    off, plainly_off = (((s - exact).norm(dim=-1) / exact.norm(dim=-1)).median() for s in (observed[0], plain))
    assert off < 1e-5 if dtype == torch.float32 else off < 1.25 * plainly_off
    assert torch.equal(model.model(ids).last_hidden_state, plain)  # and the model is what it was


@torch.no_grad()
def test_an_output_that_is_not_finite_names_the_layer(model):
    broken = copy.deepcopy(model)
    broken.model.layers[0].mlp.experts.down_proj_bias[4, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"model\.layers\.3\.mlp\.experts: activations are not finite .*NaN"):
        observe_choices(broken, lambda m: m.model(torch.arange(7, 90)[None]), [NUM_EXPERTS], first_layer=3)
