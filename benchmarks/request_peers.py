"""Who takes part in bench_requests, from token ids on.

    cuda, cpu, ..  our backends: the encoder's operator in the form that "auto" picks, and with
                   `decode_states` behind it (one operator, `recommend`, on the CPU)
    compiled       the plain encoder under torch.compile, and behind it on a GPU TorchPeer
                   (torch_peer.py), compiled, on the CPU the reference (sidmlp.beam), compiled
    plain          the same without a compiler

Each offers two calls: `encoder`, ids to states, and `whole`, ids to items. On a GPU both are CUDA
graphs, on the CPU calls. The plain encoder looks its position bias up once for all calls, since
nothing in a graph may come from the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from decode_checks import Results, VerificationError
from decode_variants import Contest
from gpu_participants import MODES, Participant, compiled
from request_checks import StatesJudge, check_items
from request_inputs import Encoder
from request_options import RequestOptions, on_gpu
from torch import Tensor
from torch_peer import TorchPeer

from sidmlp import beam
from sidmlp_kernels import MLPEncoder, Recommender, T5Encoder
from sidmlp_kernels.encoder_plan import FORMS, EncoderPlan

OPERATORS = ("encoder", "whole")
JUDGED = 8

Decode = Callable[[Tensor, Tensor], Results]
Encode = Callable[[Tensor, Tensor], Tensor]


class FixedLengthEncoder(T5Encoder):
    """A T5Encoder for requests of one number of tokens."""

    _bias: Tensor | None = None

    def fix(self, tokens: int) -> None:
        """Looks the position bias up, on the device of the weights."""
        dtype = self.embed_tokens.weight.dtype
        self._bias = super().position_bias(tokens).to(dtype).contiguous()

    def position_bias(self, length: int) -> Tensor:
        """[heads, T, T] in the dtype of the weights."""
        assert self._bias is not None
        return self._bias


def plain_encoder(
    encoder: Encoder, tokens: int, dtype: torch.dtype, device: torch.device | str
) -> torch.nn.Module:
    """`encoder` for requests of `tokens`, as the peers run it."""
    if isinstance(encoder, MLPEncoder):
        return MLPEncoder.from_weights(encoder.spec, encoder.state_dict()).to(device, dtype)
    made = FixedLengthEncoder.from_weights(encoder.spec, encoder.state_dict())
    assert isinstance(made, FixedLengthEncoder)
    made.to(device, dtype).fix(tokens)
    return made


class TorchHalves:
    """A peer's encoder and decode for batches of one size; compiled at their first calls."""

    def __init__(
        self,
        contest: Contest,
        encoder: Encoder,
        options: RequestOptions,
        dtype: torch.dtype,
        *,
        compiles: bool,
    ) -> None:
        device, k, num_beams = options.device, options.k, options.num_beams
        module = plain_encoder(encoder, options.tokens, dtype, device)
        self.decode: Decode
        if not on_gpu(options):
            student, trie = contest.reference.student_in(dtype), contest.reference.trie
            freeze = {"freezing": True}

            def decode(states: Tensor, mask: Tensor) -> Results:
                found = beam.decode_states(
                    student, states, mask, trie, k, num_beams, exact_ties=False
                )
                return found.items, found.scores, found.codes, found.counts

            def make(function: Any) -> Any:
                if not compiles:
                    return function
                return torch.compile(function, fullgraph=True, dynamic=False, options=freeze)

            self.encode, self.decode = make(module), make(decode)
            return
        mode = MODES["compiled"] if compiles else None
        peer = TorchPeer(
            contest.reference.student,
            contest.reference.trie,
            k=k,
            num_beams=num_beams,
            dtype=dtype,
            device=device,
            folded=True,
        )
        read, search = compiled(peer.context, mode), compiled(peer.beam_decode, mode)
        self.encode: Encode = compiled(module, mode)
        self.decode = lambda states, mask: search(read(states, mask))


def backend_halves(model: Recommender, options: RequestOptions) -> tuple[Encode, Decode, Any]:
    """Our encoder, our decode, and both in as few operators as there are."""
    plan = model._plan(options.k, options.num_beams, None, None, None)
    encode = model._need_encoder("decode")

    def whole(ids: Tensor, mask: Tensor) -> Results:
        if encode.joins_decode:
            return plan.recommend(ids, mask)
        return plan.decode_states(encode(ids, mask), mask)

    return encode, plan.decode_states, whole


def forms_with_these_bits(encode: EncoderPlan, ids: Tensor, mask: Tensor) -> list[str]:
    """The forms of the operator that leave the bits of "auto" here: the one that it picked, and any
    that rounds alike. Empty where PyTorch encodes."""
    if encode.packed is None:
        return []
    wanted, found = encode(ids, mask), []
    for form in FORMS:
        if form in ("auto", "torch"):
            continue
        try:
            states = dataclasses.replace(encode, form=form)(ids, mask)
        except RuntimeError:  # a form that this model does not have
            continue
        if torch.equal(states, wanted):
            found.append(form)
    return found


def participants(
    name: str,
    side: str,
    dtype: torch.dtype,
    halves: tuple[Encode, Decode, Callable[[Tensor, Tensor], Results]],
    ids: Tensor,
    mask: Tensor,
    contest: Contest,
    judge: StatesJudge,
    options: RequestOptions,
) -> list[Participant]:
    """One participant for each operator, so that each has a check of its own."""
    encode, decode, whole = halves
    timed = "graph" if on_gpu(options) else "wall"

    def check_states(states: Tensor) -> dict[str, Any]:
        return judge.check(f"encoder, {name}", states, dtype)

    def check_whole(results: Results) -> dict[str, Any]:
        return check_items(
            f"whole, {name}",
            results,
            encode(ids, mask),
            mask,
            decode if side == "backend" else None,
            contest.reference,
            k=options.k,
            num_beams=options.num_beams,
            dtype=dtype,
            requests=JUDGED,
        )

    calls = {
        "encoder": (lambda: encode(ids, mask), check_states),
        "whole": (lambda: whole(ids, mask), check_whole),
    }

    def ready(operator: str, call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        call()  # compiles here, not while something else counts
        return {operator: call}

    return [
        Participant(
            name,
            side,
            dtype,
            timed,
            lambda o=operator, c=call: ready(o, c),
            check if side == "backend" else _leaves_out(check),
        )
        for operator, (call, check) in calls.items()
    ]


def _leaves_out(check: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A check of a peer's: a wrong peer is not timed, but it ends nothing."""

    def judged(outputs: Any) -> dict[str, Any]:
        try:
            return check(outputs)
        except VerificationError as error:
            raise ValueError(f"it is wrong: {error}") from error

    return judged
