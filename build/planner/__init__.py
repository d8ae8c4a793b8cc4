"""The capacity planner: what a deployment will hold and deliver, before any GPU is rented.

    layout       tp8, dep8, 4 x dep2: how a model is dealt out          weights    exact bytes on each GPU
    kv_cache     what one GPU keeps of a sequence                       memory     what is left for it
    allocators   sequences that fit, as each engine would cut the pool  routing    distinct experts a batch wakes
    roofline     seconds of one step by resource                        throughput tok/s, best batch, what bounds it
    planning     all of it as one `Plan`; description: in plain values  comparison where a child pays; heat_map: drawn
    two_points   a CPU: two rates of the parent predict the child
    published    what others measured                                   checks     predictions held against it

Nothing here imports torch or needs a GPU. docs/planner.md shows how far the predictions are off, row by row.
"""

from puzzle_trtllm.build.planner.allocators import ALLOCATORS, DEFAULT_ALLOCATOR
from puzzle_trtllm.build.planner.assumptions import Assumptions, explain_assumptions
from puzzle_trtllm.build.planner.comparison import Comparison, compare
from puzzle_trtllm.build.planner.description import plan_json
from puzzle_trtllm.build.planner.planning import Plan, plan
from puzzle_trtllm.build.planner.throughput import Load

__all__ = [
    "ALLOCATORS",
    "DEFAULT_ALLOCATOR",
    "Assumptions",
    "Comparison",
    "Load",
    "Plan",
    "compare",
    "explain_assumptions",
    "plan",
    "plan_json",
]
