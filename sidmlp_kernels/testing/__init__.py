"""What tests and benchmarks share: seeded problems, error bounds, timing.

    problems      make_problem: weights, catalogue, states and settings, all from one seed
    grid          make_grid_problem: logits are exact multiples of 64, so scores tie exactly
    packed_model  PackedModel: what packed weights say in float64, in plain torch
    compare       rounding_floor, assert_bounded, assert_results_equal
    timing        time_interleaved: medians and tails of several callables in one run

Nothing here knows the reference implementation; whoever tests brings it along.
"""

from .compare import assert_bounded, assert_results_equal, rounding_floor
from .grid import make_grid_problem
from .packed_model import PackedModel
from .problems import Problem, exclude_tensors, make_codes, make_problem
from .timing import Timing, time_interleaved

__all__ = [
    "PackedModel",
    "Problem",
    "Timing",
    "assert_bounded",
    "assert_results_equal",
    "exclude_tensors",
    "make_codes",
    "make_grid_problem",
    "make_problem",
    "rounding_floor",
    "time_interleaved",
]
