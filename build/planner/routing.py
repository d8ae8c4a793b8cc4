"""How many different experts a batch wakes, which is how many must be read from memory.

T tokens each pick k of E experts. Under a uniform router an expert is left alone by one token with probability
1 - k/E, so the expected number of distinct experts is

    E * (1 - (1 - k/E)^T)

(exact: a token's k picks differ, tokens are independent). At T = 32 gpt-oss's 128-expert layers already read 63% of
their experts, its 64-expert layers 88%. So a pruned child saves expert bytes where batches are large, and next to
nothing at batch 1: there both read 4 experts a layer.
"""

from __future__ import annotations


def expected_distinct_experts(num_experts: int, experts_per_token: int, num_tokens: float) -> float:
    """Expected number of experts that at least one of `num_tokens` tokens is routed to, under a uniform router."""
    if experts_per_token >= num_experts:
        return float(num_experts) if num_tokens > 0 else 0.0
    return float(num_experts * (1 - (1 - experts_per_token / num_experts) ** num_tokens))
