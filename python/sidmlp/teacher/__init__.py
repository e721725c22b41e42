"""The generator that the student learns from: TIGER on a small T5, with its own beam search."""

from .model import Teacher, TeacherConfig
from .scoring import CandidateModel, CandidateScorer
from .search import PrefixTable, SearchResult, beam_search

__all__ = [
    "CandidateModel",
    "CandidateScorer",
    "PrefixTable",
    "SearchResult",
    "Teacher",
    "TeacherConfig",
    "beam_search",
]
