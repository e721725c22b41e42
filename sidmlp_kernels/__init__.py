"""Recommend items with a SID-MLP student, decoded by fused kernels.

    model = sidmlp_kernels.load("my-student")            # a directory or a Hugging Face hub id
    batch = model.batch([[12, 873, 40], [7, 7031]])      # item histories, oldest first
    recs = model.decode(batch, k=10, num_beams=50)       # recs.items [2, 10], recs.scores [2, 10]

Importing this touches no GPU and imports neither triton nor transformers.
"""

from .backends import available_backends, why_not
from .batching import Batch
from .catalogue import Catalogue
from .encoder import T5Encoder
from .graphs import GraphDecoder
from .mlp_encoder import MLPEncoder
from .recommendations import Recommendations
from .recommender import Recommender, load
from .request_graphs import RequestGraphs
from .spec import DecodeSpec, MLPEncoderSpec, StudentSpec, T5Spec, TokenSpec
from .streaming import DecodeStream, Requests
from .student import Student

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Catalogue",
    "DecodeSpec",
    "DecodeStream",
    "GraphDecoder",
    "MLPEncoder",
    "MLPEncoderSpec",
    "Recommendations",
    "Recommender",
    "RequestGraphs",
    "Requests",
    "Student",
    "StudentSpec",
    "T5Encoder",
    "T5Spec",
    "TokenSpec",
    "__version__",
    "available_backends",
    "load",
    "why_not",
]
