"""Item sequences of users: loaders, the leave-last-out split, and token batches."""

from .amazon import load_amazon
from .arrays import load_arrays, load_semantic_ids
from .interactions import Interactions
from .movielens import load_movielens
from .split import Examples, Split, leave_last_out, training_counts, training_mask
from .tables import load_table
from .token_table import TokenTable
from .tokens import TokenSpec, check_servable

__all__ = [
    "Examples",
    "Interactions",
    "Split",
    "TokenSpec",
    "TokenTable",
    "check_servable",
    "leave_last_out",
    "load_amazon",
    "load_arrays",
    "load_movielens",
    "load_semantic_ids",
    "load_table",
    "training_counts",
    "training_mask",
]
