"""Sizes and conventions of a model as frozen dataclasses: the only home of defaults.

    StudentSpec     the context readout and the heads
    TokenSpec       how item codes, users and the end become encoder tokens
    T5Spec          TIGER's encoder
    MLPEncoderSpec  SID-MLP++'s encoder
    DecodeSpec      how a request is decoded unless the call says otherwise

Each checks itself when it is made, prints itself, and travels as a plain dictionary (`to_dict`,
`from_dict`) in the checkpoint's config.json. A dictionary names every field: a missing or an
unknown one is an error, since a default filled in silently would be a guess about someone's model.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

MAX_LEVELS = 8
MAX_CODES = 32_767  # codes travel as int16
NORMALISATIONS = ("children", "codebook")
FEED_FORWARDS = ("relu", "gelu", "gated-relu", "gated-gelu")

_Spec = TypeVar("_Spec", bound="_DictSpec")


def check_int(value: object, name: str, *, low: int, high: int | None = None) -> int:
    """`value` as an int in low..high; ValueError otherwise (a bool or a float is no count)."""
    bounds = f">= {low}" if high is None else f"in {low}..{high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name}: expected an integer {bounds}, got {value!r}; pass a plain int")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}: expected an integer {bounds}, got {number}; correct {name}")
    return number


def check_float(value: object, name: str, *, positive: bool) -> float:
    """`value` as a number that float32 holds, above 0 if `positive`; ValueError otherwise."""
    wanted = "a finite number > 0" if positive else "a finite number"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name}: expected {wanted}, got {value!r}; pass a float")
    number = float(value)
    as_float32 = ctypes.c_float(number).value  # what kernels compute with
    if not math.isfinite(as_float32) or (positive and as_float32 <= 0):
        raise ValueError(f"{name}: expected {wanted}, in float32 too, got {number}; correct {name}")
    return number


def check_choice(value: object, name: str, choices: Sequence[str]) -> str:
    """`value` if it is one of `choices`; ValueError otherwise."""
    if not isinstance(value, str) or value not in choices:
        wanted = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected {wanted}, got {value!r}; pass one of these")
    return value


def _check_tuple(value: object, name: str, what: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{name}: expected {what}, got {value!r}; pass a tuple or a list")
    return tuple(value)


def check_floats(
    value: object, name: str, *, length: int, positive: bool = False
) -> tuple[float, ...]:
    """`value` as `length` finite floats, one per level; ValueError otherwise."""
    values = _check_tuple(value, name, f"{length} numbers, one per level")
    if len(values) != length:
        raise ValueError(
            f"{name}: expected {length} numbers, one per level, got {len(values)}; "
            "give every level its own"
        )
    return tuple(
        check_float(_python_number(x), f"{name}[{i}]", positive=positive)
        for i, x in enumerate(values)
    )


def _python_number(value: Any) -> Any:
    """A 0-dimensional tensor as a Python number; anything else as it is."""
    is_scalar_tensor = not isinstance(value, numbers.Number) and getattr(value, "ndim", None) == 0
    return value.item() if is_scalar_tensor else value


class _DictSpec:
    """to_dict / from_dict of the frozen dataclasses below."""

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, tuples as lists: what config.json stores."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls: type[_Spec], values: object) -> _Spec:
        """The spec that `to_dict` described; ValueError names missing and unknown fields."""
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{cls.__name__}: expected an object of named fields, got "
                f"{type(values).__name__}; write it with to_dict()"
            )
        expected = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        missing = [name for name in expected if name not in values]
        unknown = [str(name) for name in values if name not in expected]
        if missing or unknown:
            raise ValueError(
                f"{cls.__name__}: expected the fields {expected}, got missing {missing} and "
                f"unknown {unknown}; write it with to_dict() of the same version"
            )
        return cls(**{str(k): tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def check_codes_per_level(value: object) -> tuple[int, ...]:
    """C_1..C_L as a tuple; ValueError unless there are 1..8 levels of 1..32767 codes."""
    codes = _check_tuple(value, "codes_per_level", "one size per level")
    if not 1 <= len(codes) <= MAX_LEVELS:
        raise ValueError(
            f"codes_per_level: expected 1..{MAX_LEVELS} levels, got {len(codes)}; "
            "give one codebook size per level"
        )
    return tuple(
        check_int(c, f"codes_per_level[{i}]", low=1, high=MAX_CODES) for i, c in enumerate(codes)
    )


@dataclass(frozen=True)
class StudentSpec(_DictSpec):
    """Sizes of the SID-MLP student (arXiv 2605.12617, section 3).

    codes_per_level  C_1..C_L, the codes of each level
    dim              D, the width of encoder states and of the context
    attention_dim    A, the width of the readout's queries, keys and values
    num_heads        heads of the readout's attention
    ffn_dim          F, the hidden width of the readout's feed-forward
    hidden_dim       H, the hidden width of every head
    embedding_dim    E, the width of a code's embedding (usually D)
    blocks_per_head  1 = the first layer alone; each further block is [H, H]
    layer_norm_eps   added to the variance in every LayerNorm

    Raises ValueError for a size out of range.
    """

    codes_per_level: tuple[int, ...]
    dim: int
    attention_dim: int
    num_heads: int
    ffn_dim: int
    hidden_dim: int
    embedding_dim: int
    blocks_per_head: int = 1
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        self._set("codes_per_level", check_codes_per_level(self.codes_per_level))
        sizes = ("dim", "attention_dim", "num_heads", "ffn_dim", "hidden_dim", "embedding_dim")
        for name in (*sizes, "blocks_per_head"):
            self._set(name, check_int(getattr(self, name), name, low=1))
        eps = check_float(self.layer_norm_eps, "layer_norm_eps", positive=True)
        self._set("layer_norm_eps", eps)
        if self.attention_dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of attention_dim={self.attention_dim}, got "
                f"{self.num_heads}; pass the number of heads that the student was trained with"
            )

    @property
    def num_levels(self) -> int:
        """L, the number of codes of an item."""
        return len(self.codes_per_level)


@dataclass(frozen=True)
class TokenSpec(_DictSpec):
    """How a request becomes encoder tokens: [user, codes of each item in order, eos], right padded.

    pad_id           fills the right end
    code_offsets     token of code c at level l = code_offsets[l-1] + c
    user_offset      first user token; a user without an id is this token
    num_user_tokens  user u is token user_offset + u mod num_user_tokens
    eos_id           the last token of a request and the largest token id
    max_items        longer histories keep their newest max_items items

    Raises ValueError for ids that are negative, unordered or not below eos_id.
    """

    code_offsets: tuple[int, ...]
    user_offset: int
    eos_id: int
    pad_id: int = 0
    num_user_tokens: int = 1
    max_items: int = 20

    def __post_init__(self) -> None:
        offsets = _check_tuple(self.code_offsets, "code_offsets", "one offset per level")
        if not 1 <= len(offsets) <= MAX_LEVELS:
            raise ValueError(
                f"code_offsets: expected 1..{MAX_LEVELS} offsets, one per level, got "
                f"{len(offsets)}; use TokenSpec.for_codes(codes_per_level)"
            )
        offsets = tuple(check_int(o, f"code_offsets[{i}]", low=0) for i, o in enumerate(offsets))
        self._set("code_offsets", offsets)
        for name, low in (("user_offset", 0), ("eos_id", 0), ("pad_id", 0)):
            self._set(name, check_int(getattr(self, name), name, low=low))
        for name in ("num_user_tokens", "max_items"):
            self._set(name, check_int(getattr(self, name), name, low=1))
        highest = max(*offsets, self.pad_id, self.user_offset + self.num_user_tokens - 1)
        if self.eos_id <= highest:
            raise ValueError(
                f"eos_id: expected the largest token id (> {highest}), got {self.eos_id}; "
                "use TokenSpec.for_codes(codes_per_level)"
            )

    @classmethod
    def for_codes(
        cls, codes_per_level: Sequence[int], *, num_user_tokens: int = 1, max_items: int = 20
    ) -> TokenSpec:
        """The usual layout: pad 0, codes from 1 level after level, user tokens, eos."""
        codes = check_codes_per_level(codes_per_level)
        first_tokens = list(itertools.accumulate(codes, initial=1))
        return cls(
            code_offsets=tuple(first_tokens[:-1]),
            user_offset=first_tokens[-1],
            eos_id=first_tokens[-1] + num_user_tokens,
            num_user_tokens=num_user_tokens,
            max_items=max_items,
        )

    @property
    def vocab_size(self) -> int:
        """Rows an encoder's embedding needs: eos_id + 1."""
        return self.eos_id + 1

    @property
    def max_length(self) -> int:
        """Longest request in tokens: 2 + max_items * L."""
        return 2 + self.max_items * len(self.code_offsets)

    def check_codes(self, codes_per_level: Sequence[int]) -> None:
        """ValueError unless levels agree and no two kinds of token share an id."""
        if len(codes_per_level) != len(self.code_offsets):
            raise ValueError(
                f"code_offsets: expected {len(codes_per_level)} levels as in the student, got "
                f"{len(self.code_offsets)}; use TokenSpec.for_codes(codes_per_level)"
            )
        spans = [
            (offset, offset + size, f"codes of level {level}")
            for level, (offset, size) in enumerate(
                zip(self.code_offsets, codes_per_level, strict=True), start=1
            )
        ]
        spans.append((self.user_offset, self.user_offset + self.num_user_tokens, "user tokens"))
        spans.append((self.pad_id, self.pad_id + 1, "pad"))
        spans.append((self.eos_id, self.eos_id + 1, "eos"))
        spans.sort()
        for (_, end, left), (begin, _, right) in itertools.pairwise(spans):
            if begin < end:
                raise ValueError(
                    f"tokens: expected separate ids, got {left} (up to {end - 1}) overlapping "
                    f"{right} (from {begin}); use TokenSpec.for_codes(codes_per_level)"
                )


@dataclass(frozen=True)
class T5Spec(_DictSpec):
    """Sizes of TIGER's T5 encoder (arXiv 1910.10683; pre-RMSNorm, relative position buckets).

    num_layers              blocks of self-attention and feed-forward
    dim                     D, the width of a state
    num_heads, head_dim     attention width = num_heads * head_dim, any multiple
    ffn_dim                 hidden width of the feed-forward
    vocab_size              rows of the token embedding
    feed_forward            "relu" | "gelu" (erf) | "gated-relu" | "gated-gelu" (tanh: T5 v1.1)
    relative_buckets        relative position buckets, half for each direction
    relative_max_distance   distances from here on share the last bucket
    layer_norm_eps          added to the mean square in every RMSNorm

    Raises ValueError for a size out of range.
    """

    num_layers: int
    dim: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    feed_forward: str = "relu"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("num_layers", "dim", "num_heads", "head_dim", "ffn_dim", "vocab_size"):
            self._set(name, check_int(getattr(self, name), name, low=1))
        check_choice(self.feed_forward, "feed_forward", FEED_FORWARDS)
        buckets = check_int(self.relative_buckets, "relative_buckets", low=4)
        if buckets % 2:
            raise ValueError(
                f"relative_buckets: expected an even number, half for each direction, got "
                f"{buckets}; pass the teacher's relative_attention_num_buckets"
            )
        self._set("relative_buckets", buckets)
        distance = check_int(
            self.relative_max_distance, "relative_max_distance", low=buckets // 4 + 1
        )
        self._set("relative_max_distance", distance)
        eps = check_float(self.layer_norm_eps, "layer_norm_eps", positive=True)
        self._set("layer_norm_eps", eps)


@dataclass(frozen=True)
class MLPEncoderSpec(_DictSpec):
    """Sizes of SID-MLP++'s encoder (arXiv 2605.12617; position-specific MLPs and a mean).

    num_layers      layers of mean and MLPs
    num_roles       L, MLPs of a layer: a token's role is its place inside its item
    dim             D, the width of a state
    hidden_dim      hidden width of every MLP
    vocab_size      rows of the token embedding
    max_length      rows of the position embedding: the longest request in tokens
    layer_norm_eps  added to the variance in every LayerNorm

    Raises ValueError for a size out of range.
    """

    num_layers: int
    num_roles: int
    dim: int
    hidden_dim: int
    vocab_size: int
    max_length: int
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("num_layers", "dim", "hidden_dim", "vocab_size", "max_length"):
            self._set(name, check_int(getattr(self, name), name, low=1))
        self._set("num_roles", check_int(self.num_roles, "num_roles", low=1, high=MAX_LEVELS))
        eps = check_float(self.layer_norm_eps, "layer_norm_eps", positive=True)
        self._set("layer_norm_eps", eps)


EncoderSpec = T5Spec | MLPEncoderSpec


@dataclass(frozen=True)
class DecodeSpec(_DictSpec):
    """How a request is decoded unless the call says otherwise.

    temperatures   t_l > 0, logits of level l are divided by it
    level_weights  w_l, score = sum over levels of w_l * logp_l
    num_beams      candidates that survive each level
    normalisation  "children": softmax over a node's children (level 1: all codes), as SID-MLP;
                   "codebook": softmax over all codes of the level, then the constraint

    Raises ValueError for a value out of range.
    """

    temperatures: tuple[float, ...]
    level_weights: tuple[float, ...]
    num_beams: int = 50
    normalisation: str = "children"

    def __post_init__(self) -> None:
        self._set("num_beams", check_int(self.num_beams, "num_beams", low=1))
        check_choice(self.normalisation, "normalisation", NORMALISATIONS)
        temperatures = _check_tuple(self.temperatures, "temperatures", "one number per level")
        levels = check_int(len(temperatures), "length of temperatures", low=1, high=MAX_LEVELS)
        temperatures = check_floats(temperatures, "temperatures", length=levels, positive=True)
        self._set("temperatures", temperatures)
        weights = check_floats(self.level_weights, "level_weights", length=levels)
        self._set("level_weights", weights)

    @classmethod
    def for_levels(cls, num_levels: int) -> DecodeSpec:
        """Temperature 1 and weight 1 at each of L levels, and the defaults above."""
        levels = check_int(num_levels, "num_levels", low=1, high=MAX_LEVELS)
        return cls(temperatures=(1.0,) * levels, level_weights=(1.0,) * levels)


# The sizes that the paper publishes: 4 levels of 256 codes, a teacher of width 128.
PUBLISHED = StudentSpec(
    codes_per_level=(256, 256, 256, 256),
    dim=128,
    attention_dim=384,
    num_heads=6,
    ffn_dim=1024,
    hidden_dim=512,
    embedding_dim=128,
)
