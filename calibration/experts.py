"""`calibrate experts`: how much each expert of each layer matters, learned from real tokens in one forward pass.

`expert_choices` says what is observed, `expert_scores` what the scores are. A model that does not fit in memory goes
layer by layer (layer_stream.py); a layer's tokens are scored as soon as it is done, so only its scores stay.

The result is the importance file that `derive` reads: float32 `model.layers.{i}.mlp.experts.importance` [num_experts],
larger means keep, by the score and the kind of removal that were asked for. Every score of the same pass stands beside
it, one-shot, as `model.layers.{i}.mlp.experts.score.{votes,output_error,router_mass,reap}`, for whoever wants to look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import puzzle_trtllm
from puzzle_trtllm.architecture import read_blocks
from puzzle_trtllm.calibration import expert_scores
from puzzle_trtllm.calibration.dataset import CalibrationDataset, DataOptions, load_chosen
from puzzle_trtllm.calibration.expert_choices import TokenChoices, observe_choices
from puzzle_trtllm.calibration.expert_scores import REMOVALS, SCORES, Removal, Score
from puzzle_trtllm.calibration.forward import run_dataset
from puzzle_trtllm.calibration.layer_stream import Observation, stream_layers
from puzzle_trtllm.calibration.memory import should_stream
from puzzle_trtllm.calibration.tensor_file import write_tensors
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CalibrationError
from puzzle_trtllm.folders import check_writable
from puzzle_trtllm.models.huggingface.loading import load_causal_lm

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_SCORE: Score = "votes"
DEFAULT_REMOVAL: Removal = "iterative"
MAX_TOKENS = 65_536
WHAT = "expert importance"


@dataclass(frozen=True, kw_only=True)
class LayerImportance:
    """One layer's experts; arrays are by expert."""

    importance: NDArray[np.float32]
    scores: dict[Score, NDArray[np.float32]]
    """Every score, one-shot."""
    kept: int | None
    """How many the child keeps, when its architecture was given; then the two below say what that costs."""
    relative_error: float | None
    """Root mean square change of the layer's MoE output with only those, over the output's root mean square."""
    share_out_of_choices: float | None
    """Tokens for which that is approximate: fewer than k of the kept experts are among their observed choices."""

    @property
    def votes(self) -> tuple[int, ...]:
        """Tokens that are routed to each expert."""
        return tuple(int(count) for count in self.scores["votes"])

    @property
    def never_routed(self) -> tuple[int, ...]:
        """The experts that no token was routed to; they are the first to go."""
        return tuple(expert for expert, count in enumerate(self.votes) if count == 0)

    @property
    def least_important(self) -> int:
        """The expert that goes first."""
        return int(np.flatnonzero(self.importance == self.importance.min())[-1])


@dataclass(frozen=True, kw_only=True)
class ExpertCalibration:
    """What was learned, and from what."""

    out: Path
    score: Score
    removal: Removal
    num_choices: tuple[int, ...]
    """By layer: how many experts of each token were run."""
    num_sequences: int
    num_tokens: int
    dataset: str
    dataset_fingerprint: str
    dataset_is_bundled: bool
    parent_fingerprint: str
    layers: tuple[LayerImportance, ...]

    @property
    def method(self) -> str:
        return f"{self.score}, {self.removal}"


def calibrate_experts(
    checkpoint: str | Path,
    out: str | Path,
    *,
    score: Score = DEFAULT_SCORE,
    removal: Removal = DEFAULT_REMOVAL,
    architecture: str | Path | None = None,
    choices: int | None = None,
    dtype: torch.dtype = torch.float32,
    stream: bool | None = None,
    overwrite: bool = False,
    quiet: bool = True,
    **data_options: Unpack[DataOptions],
) -> ExpertCalibration:
    """Score the experts of `checkpoint` and write the importance file `out`.

    What to calibrate on: `dataset` and the other keywords of DataOptions; at most 65,536 tokens unless they say so.
    `architecture` is the child's (a file as `derive` reads it): the report then says what its expert counts cost.
    `choices` is how many experts of each token are run; None: k + 1, which is exact for one-shot removal and for votes,
    and up to 2 k where tokens are followed further: in iterative removal, or to what `architecture` keeps.
    `stream` holds one layer in memory at a time; None decides by the memory that is free. The result is the same.
    Raises CalibrationError (options, data, activations), ArchitectureError, CheckpointError, or PuzzleError when `out`
    exists without `overwrite`.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise CalibrationError("exists (--overwrite replaces it)", file=out)
    source = Checkpoint.open(checkpoint)
    _check_place(out, source)
    kept = _kept_counts(source, architecture)
    job = _Job(
        score=_one_of("score", score, SCORES),
        removal=_one_of("removal", removal, REMOVALS),
        kept=kept,
        num_choices=_num_choices(source, kept, choices, follows=removal == "iterative" and score != "votes"),
    )
    data = load_chosen(source, data_options, max_tokens=MAX_TOKENS)
    if should_stream(source, dtype, wanted=stream):
        seen = _stream(source, data, job, out=out, dtype=dtype, quiet=quiet)
    else:
        model = load_causal_lm(source, dtype=dtype)
        layers = observe_choices(model, lambda m: run_dataset(m, data, what=WHAT, quiet=quiet), job.num_choices)
        seen = [job.observe(layer, i) for i, layer in enumerate(layers)]
    report = ExpertCalibration(
        out=out,
        score=job.score,
        removal=job.removal,
        num_choices=job.num_choices,
        num_sequences=len(data.sequences),
        num_tokens=data.num_tokens,
        dataset=str(data.source),
        dataset_fingerprint=data.fingerprint,
        dataset_is_bundled=data.is_bundled,
        parent_fingerprint=source.fingerprint(),
        layers=tuple(job.layer(observation, i) for i, observation in enumerate(seen)),
    )
    _write(report)
    return report


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is to be made of a layer's choices."""

    score: Score
    removal: Removal
    kept: tuple[int, ...] | None
    num_choices: tuple[int, ...]

    def observe(self, choices: TokenChoices, layer: int) -> Observation:
        """Small enough to keep, whatever the number of tokens."""
        importance = expert_scores.importance(choices, self.score, self.removal)
        observation: Observation = {"importance": torch.from_numpy(importance)}
        for score in SCORES:
            observation[score] = torch.from_numpy(expert_scores.one_shot(choices, score).astype(np.float32))
        costs: list[float] = []
        if self.kept is not None:
            best = np.argsort(-importance, kind="stable")[: self.kept[layer]].tolist()
            costs = [expert_scores.relative_error(choices, best), expert_scores.share_out_of_choices(choices, best)]
        return {**observation, "costs": torch.tensor(costs, dtype=torch.float64)}

    def layer(self, seen: Observation, layer: int) -> LayerImportance:
        relative_error, share_out_of_choices = seen["costs"].tolist() or (None, None)
        return LayerImportance(
            importance=seen["importance"].numpy(),
            scores={score: seen[score].numpy() for score in SCORES},
            kept=None if self.kept is None else self.kept[layer],
            relative_error=relative_error,
            share_out_of_choices=share_out_of_choices,
        )


def _stream(
    source: Checkpoint, data: CalibrationDataset, job: _Job, *, out: Path, dtype: torch.dtype, quiet: bool
) -> list[Observation]:
    def visit(model: Any, run: Callable[[Any], None], layer: int) -> Observation:
        (choices,) = observe_choices(model, run, job.num_choices[layer : layer + 1], first_layer=layer)
        return job.observe(choices, layer)

    return stream_layers(source, data, visit, out=out, what=WHAT, settings=vars(job), dtype=dtype, quiet=quiet)


def _check_place(out: Path, source: Checkpoint) -> None:
    """Every *.safetensors file in a checkpoint's folder is read as one of its shards."""
    if out.resolve().parent == source.path.resolve():
        expected = "a place outside, such as experts.safetensors"
        raise CalibrationError("would lie among the files of the checkpoint", file=out, expected=expected)
    check_writable(out)


def _one_of(key: str, value: Any, known: Sequence[Any]) -> Any:
    if value not in known:
        raise CalibrationError("unknown", key=key, found=value, expected=", ".join(known))
    return value


def _kept_counts(source: Checkpoint, architecture: str | Path | None) -> tuple[int, ...] | None:
    if architecture is None:
        return None
    return tuple(block.num_local_experts for block in read_blocks(architecture, source.architecture))


def _num_choices(
    source: Checkpoint, kept: tuple[int, ...] | None, wanted: int | None, *, follows: bool
) -> tuple[int, ...]:
    """m of each layer; `follows` tokens beyond the expert that is next, or not."""
    top_k = source.architecture.experts_per_token
    if wanted is not None and wanted < top_k + 1:
        expected = f"at least {top_k + 1} (the {top_k} that a token is routed to, and the next)"
        raise CalibrationError("too few", key="choices", found=wanted, expected=expected)
    counts = [block.num_local_experts for block in source.architecture.blocks]
    most = [1] * len(counts) if kept is None else [max(1, a - b) for a, b in zip(counts, kept, strict=True)]
    if follows and kept is None:
        most = [top_k] * len(counts)
    return tuple(min(count, wanted or top_k + min(top_k, lost)) for count, lost in zip(counts, most, strict=True))


def _write(report: ExpertCalibration) -> None:
    tensors: dict[str, NDArray[np.float32]] = {}
    for i, layer in enumerate(report.layers):
        prefix = f"model.layers.{i}.mlp.experts"
        tensors[f"{prefix}.importance"] = layer.importance
        tensors |= {f"{prefix}.score.{name.replace('-', '_')}": values for name, values in layer.scores.items()}
    metadata = {
        "method": report.method,
        "choices": " ".join(map(str, report.num_choices)),
        "dataset": report.dataset,
        "dataset_fingerprint": report.dataset_fingerprint,
        "num_tokens": str(report.num_tokens),
        "parent_fingerprint": report.parent_fingerprint,
        "tool_version": puzzle_trtllm.__version__,
    }
    write_tensors(report.out, tensors, metadata)
