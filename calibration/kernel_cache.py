"""How many compiled kernels oneDNN keeps, which a stream's memory depends on.

oneDNN compiles a kernel for every shape that it multiplies in bfloat16, and routing gives every expert a shape of its
own in every layer: at its default of 1,024 kernels that grew to 0.4 GB, more than a small layer. With 128 a stream took
the same time (docs/performance.md). oneDNN reads the number once, from the environment, so it is set by the command,
for its own process and those of its ranks, and never by a Python function; whoever has set it keeps their own.
"""

from __future__ import annotations

import os

VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
KEPT_KERNELS = 128


def limit_kernel_cache() -> None:
    """For this process and those it starts; to be called before torch multiplies anything."""
    os.environ.setdefault(VARIABLE, str(KEPT_KERNELS))
