"""How token ids become states: the backend's fused operator, or plain PyTorch and why.

    "auto"          the operator where the backend has one for the encoder, else PyTorch; where the
                    backend was chosen by "auto", Triton's operator before PyTorch
    "throughput"    the operator, a block of threads for each request or several at once
    "cluster1", "cluster2", "cluster4", "cluster8"    the operator, as many blocks for each request;
                    of SID-MLP++'s encoder at most one for each role
    "long"          the operator, all blocks through all requests together, layer by layer: T5 of
                    the widths in `long_why_not`; "auto" takes it for batches of over 128 columns,
                    but for models that were packed for short requests (`pack_encoder`)
    "torch"         PyTorch

A form that names the operator raises where the backend has none. States have the same bits in every
batch within one form; "auto" chooses one by the batch. On the CPU all forms are the same, and on
Triton, where an encoder of n layers is n + 1 launches whatever the batch; those of SID-MLP++'s
encoder have the same bits everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backends import encoder_why_not, why_not
from .encoder import T5Encoder
from .encoder_packing import BIAS_TOKENS, PackedEncoder, pack_encoder
from .mlp_encoder import MLPEncoder
from .ops.library import operator
from .spec import EncoderSpec, T5Spec, check_choice
from .streams import note_stream

if TYPE_CHECKING:
    from .ops.triton.encoder_bound import BoundEncoder

# What the operators call them.
_FORM_NUMBERS = {
    "auto": 0,
    "throughput": 1,
    "cluster1": 16,
    "cluster2": 2,
    "cluster4": 4,
    "cluster8": 8,
    "long": 32,
}
FORMS = (*_FORM_NUMBERS, "torch")

EncoderModule = T5Encoder | MLPEncoder
Encoder = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class EncoderPlan:
    """One way to encode, ready to run; print it to see what was chosen.

    packed  what the operator reads, None where `module` runs
    module  what PyTorch runs, None where the operator does
    reason  why not the operator of the decode's backend, "" where that is what runs
    """

    backend: str
    form: str
    packed: PackedEncoder | None
    module: Encoder | None
    reason: str
    _streams: set[int] = field(init=False, repr=False, default_factory=set)  # that have run it
    # Triton's host side is Python: what its operator checks and compiles is done once, here.
    _bound: BoundEncoder | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.backend == "triton" and self.packed is not None:
            from .ops.triton.encoder_bound import bind_encoder

            bound = bind_encoder(*self.operator_args(), self.packed.tensors[0].device)
            object.__setattr__(self, "_bound", bound)

    def check_tokens(self, ids: Tensor) -> None:
        """ValueError if requests have more tokens than what runs the encoder takes."""
        most, why, remedy = None, "the encoder has positions for", "cut the histories"
        if self.packed is not None:
            most = self.packed.max_tokens
            if isinstance(self.packed.spec, T5Spec):
                why = f"the fused encoder of {self.backend} was packed for, by the TokenSpec"
                remedy = "cut the histories, or load the model with encoder_form='torch'"
        elif isinstance(self.module, MLPEncoder):
            most = self.module.spec.max_length
        if most is not None and ids.shape[1] > most:
            raise ValueError(
                f"batch: expected at most {most} tokens a request, as many as {why}, got "
                f"{ids.shape[1]}; {remedy}"
            )

    @property
    def joins_decode(self) -> bool:
        """Whether `sidmlp::recommend` runs this encoder and a decode on its backend as one
        operator."""
        return self.packed is not None and self.backend != "triton"

    def note_stream(self) -> None:
        """Says which streams read the weights, before each call on a GPU."""
        if self.packed is not None:
            tensors = self.packed.tensors
        elif isinstance(self.module, (T5Encoder, MLPEncoder)):
            tensors = tuple(self.module.parameters())
        else:
            return  # the caller's own
        note_stream(tensors, tensors[0].device, self._streams)

    def operator_args(self) -> tuple[list[Tensor], list[int], float, int]:
        """What operators take of the encoder: tensors, sizes, eps and form."""
        packed = self.packed
        assert packed is not None
        eps, form = packed.spec.layer_norm_eps, _FORM_NUMBERS[self.form]
        return list(packed.tensors), list(packed.sizes), eps, form

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 [B, T], mask bool [B, T] (True = a token) -> states [B, T, D]."""
        self.note_stream()
        if self.packed is None:
            assert self.module is not None
            with torch.no_grad():
                return self.module(ids, mask)
        if self._bound is not None and not torch.compiler.is_compiling():
            return self._bound(ids.contiguous(), mask.contiguous())
        encode = operator(self.packed.operator, self.backend)
        return encode(ids.contiguous(), mask.contiguous(), *self.operator_args(), 0)

    def __str__(self) -> str:
        if self.packed is None:
            return f"encoder: {self.reason}"
        form = "by batch" if self.form == "auto" else self.form
        if self.backend == "triton":
            form = f"the only one: {self.packed.sizes[0] + 1} launches"
        since = f", since {self.reason}" if self.reason else ""
        return f"encoder: {self.packed.operator} on {self.backend}, form {form}{since}"


def long_why_not(spec: EncoderSpec) -> str:
    """Why CUDA has no form "long" for an encoder; "" where it has (encoder/long.h)."""
    if not isinstance(spec, T5Spec):
        return "only T5 encoders have it"
    if spec.dim not in (128, 256):
        return f"dim: expected 128 or 256, got {spec.dim}"
    if spec.head_dim != 64:
        return f"head_dim: expected 64, got {spec.head_dim}"
    if spec.num_heads > 16:
        return f"num_heads: expected at most 16, got {spec.num_heads}"
    if spec.ffn_dim % 128 != 0:
        return f"ffn_dim: expected a multiple of 128, got {spec.ffn_dim}"
    if spec.feed_forward.startswith("gated-"):
        return f"feed_forward: expected one without a gate, got {spec.feed_forward}"
    return ""


def plan_encoder(
    encoder: EncoderModule | Encoder,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    form: str = "auto",
    max_tokens: int = BIAS_TOKENS,
    others: Sequence[str] = (),
) -> EncoderPlan:
    """Packs `encoder`, or converts it to `device` and `dtype`, for `backend`.

    max_tokens: of a request, see `pack_encoder`. others: backends of the same device that form
    "auto" tries before PyTorch.

    A callable that is neither a T5Encoder nor an MLPEncoder runs as it is. Raises ValueError for an
    unknown form, and for one of the operator's where the backend does not have it.
    """
    check_choice(form, "encoder_form", FORMS)
    if isinstance(encoder, (T5Encoder, MLPEncoder)):
        missing = encoder_why_not(backend, encoder.spec, dtype)
        limited = backend == "cuda" and isinstance(encoder, T5Encoder)
        if limited and not missing and max_tokens > BIAS_TOKENS:
            missing = f"requests of {max_tokens} tokens, of which this backend takes {BIAS_TOKENS}"
        if form == "long" and backend == "cuda" and not missing:
            missing = long_why_not(encoder.spec)
    else:
        missing = "it is a callable of the caller's"
    if missing and form not in ("auto", "torch"):
        raise ValueError(
            f"encoder_form: expected a fused encoder on backend {backend} for {form!r}, got none "
            f"({missing}); pass encoder_form='auto' or 'torch'"
        )
    runs = "" if missing else backend
    if missing and form == "auto" and isinstance(encoder, (T5Encoder, MLPEncoder)):
        for other in others:
            if not (why_not(other, dtype=dtype) or encoder_why_not(other, encoder.spec, dtype)):
                runs = other
                break
    if runs and form != "torch":
        assert isinstance(encoder, (T5Encoder, MLPEncoder))
        packed = pack_encoder(encoder, dtype, runs, max_tokens).to(device)
        return EncoderPlan(runs, form, packed, None, missing and f"{backend}: {missing}")
    reason = f"plain PyTorch ({missing or 'as asked for'})"
    moves = (device, dtype) != (torch.device("cpu"), torch.float32)
    if moves and isinstance(encoder, (T5Encoder, MLPEncoder)):
        encoder = copy.deepcopy(encoder).to(device, dtype)
    return EncoderPlan(backend, form, None, encoder, reason)
