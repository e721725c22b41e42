"""The generators that students learn from: TIGER on a small T5, decoder-only ones, anybody's."""

from .backbones import BACKBONES, make_teacher, read_teacher, write_teacher
from .causal import CausalConfig, CausalTeacher
from .distillable import Distillable
from .generative import GenerativeTeacher, SequenceState
from .model import Teacher, TeacherConfig
from .scoring import CandidateModel, CandidateScorer, RequestModel
from .search import PrefixTable, SearchResult, beam_search

__all__ = [
    "BACKBONES",
    "CandidateModel",
    "CandidateScorer",
    "CausalConfig",
    "CausalTeacher",
    "Distillable",
    "GenerativeTeacher",
    "PrefixTable",
    "RequestModel",
    "SearchResult",
    "SequenceState",
    "Teacher",
    "TeacherConfig",
    "beam_search",
    "make_teacher",
    "read_teacher",
    "write_teacher",
]
