"""The assets that the paper's authors publish, read into the models and codes of this package."""

from .files import Published, codes_of_items, read_published, read_semantic_ids
from .models import encoder_from_official, teacher_from_official

__all__ = [
    "Published",
    "codes_of_items",
    "encoder_from_official",
    "read_published",
    "read_semantic_ids",
    "teacher_from_official",
]
