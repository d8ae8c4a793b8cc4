"""The gpt-oss forward pass over one step's flattened rows.

The same mathematics as transformers' `GptOssForCausalLM` (modeling_gpt_oss.py), each layer with its own expert count
and window; what differs is the layout: one row axis for all sequences, K and V in a paged cache, logits only where a
token will be sampled.

Legend: T rows, D hidden, H query heads, K KV heads, Dh head dim, R rows with logits, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor

from puzzle_trtllm.models.reference.kernels import Kernels
from puzzle_trtllm.models.reference.kernels.kv_storage import take
from puzzle_trtllm.models.reference.kv_cache import PagedKvCache
from puzzle_trtllm.models.reference.rank_group import ALONE, Ranks
from puzzle_trtllm.models.reference.step import Step
from puzzle_trtllm.models.reference.weights import LayerWeights, ModelWeights


class ReferenceModel:
    """Weights and rotary tables; `forward` runs one step. The weights are those of one of `ranks`."""

    def __init__(self, weights: ModelWeights, kernels: Kernels, *, max_seq_len: int, ranks: Ranks = ALONE) -> None:
        self.weights = weights
        self.kernels = kernels
        self.ranks = ranks
        self.architecture = weights.architecture
        self.max_seq_len = max_seq_len
        rope, head_dim = self.architecture.rope, self.architecture.head_dim
        frequencies = torch.from_numpy(rope.inverse_frequencies(head_dim))
        angles = torch.arange(max_seq_len, dtype=torch.float32)[:, None] * frequencies[None, :]
        self._cos = (angles.cos() * rope.attention_scaling).to(weights.embedding)
        self._sin = (angles.sin() * rope.attention_scaling).to(weights.embedding)

    @torch.inference_mode()
    def forward(self, step: Step, cache: PagedKvCache) -> Tensor:
        """Logits float32 `[R, V]` of the rows that want them; with several ranks, on the first one only."""
        weights, kernels, eps = self.weights, self.kernels, self.architecture.rms_norm_eps
        x = F.embedding(step.token_ids, weights.embedding)
        for index, layer in enumerate(weights.layers):
            normed = kernels.rms_norm(x, layer.input_norm, eps)
            x = x + self._attention(layer, normed, step, cache.storage[index])
            x = x + self._experts(layer, kernels.rms_norm(x, layer.post_norm, eps))
        logits = weights.head(kernels.rms_norm(x[step.logit_rows], weights.final_norm, eps))
        return self.ranks.gather_columns(logits, self.architecture.vocab_size).float()

    def _attention(self, layer: LayerWeights, x: Tensor, step: Step, storage: Tensor) -> Tensor:
        a, kernels, decodes = self.architecture, self.kernels, step.num_decodes
        qkv = layer.qkv(x).view(len(x), -1, a.head_dim)
        q, kv = kernels.rotate(qkv, self._cos, self._sin, step.positions, a.num_key_value_heads, storage.dtype)
        group = step.groups[layer.block.sliding_window]
        attended = []
        if group.prefill is not None and step.chunks is not None:
            # Before the write: the past may lie in blocks that the chunk is about to take over.
            own = q[decodes:], kv[:, decodes:], layer.sinks
            attended = [kernels.prefill_attention(*own, storage, group.prefill, step.chunks)]
        kept = kv if group.write_tokens is None else take(kv, group.write_tokens)
        kernels.write(storage, group.write_rows, group.write_offsets, kept)
        if group.decode is not None:
            attended = [kernels.decode_attention(q[:decodes], layer.sinks, storage, group.decode), *attended]
        return self.ranks.sum(layer.out(torch.cat(attended) if len(attended) > 1 else attended[0]))

    def _experts(self, layer: LayerWeights, x: Tensor) -> Tensor:
        """Each token to the top k of its layer's router logits, weighted by a softmax over those k."""
        shares, chosen = self.kernels.route(layer.router(x), self.architecture.experts_per_token)
        if len(layer.held_experts) < layer.block.num_local_experts:
            chosen = _count_held(chosen, layer.held_experts)
        return self.ranks.sum(layer.experts(x, shares, chosen))


def _count_held(chosen: Tensor, held: range) -> Tensor:
    """The router's expert numbers as numbers of the `held` ones; `len(held)` for all others."""
    own = chosen - held.start
    return own.masked_fill_((own < 0) | (own >= len(held)), len(held))
