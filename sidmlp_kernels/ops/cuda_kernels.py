"""Which kernel the CUDA backend launches, and how it cuts a batch; chosen in csrc/cuda/sm90.

    tensor cores   csrc/cuda/sm90: half-precision weights, one block per head, clusters of blocks
    plain          csrc/cuda: every other size, float32 too; one thread block a request

The choice depends on model and settings, never on the batch, so that a batch never changes a bit.
What is said here comes from the functions that a launch asks: csrc/cuda/sm90/shape.cpp is compiled
into the host module, too.

`python -m sidmlp_kernels.ops.cuda_kernels` prints the cuts for the published sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from sidmlp_kernels.spec import PUBLISHED, StudentSpec
from sidmlp_kernels.trie import host_library

_ANY = 2**31 - 1  # INT_MAX in csrc/cuda/sm90/cuts.h: a batch of any size


class Cut(NamedTuple):
    """How a cluster of thread blocks takes requests, in batches of at most `most_requests`."""

    most_requests: int
    cluster: int  # thread blocks
    group: int  # requests that they take together
    resident: int  # blocks on a multiprocessor
    reason: str


def tensor_cores_why_not(spec: StudentSpec, dtype: torch.dtype, num_beams: int) -> str:
    """Why the plain kernel decodes these sizes; "" where the tensor core kernel does."""
    return str(host_library().tensor_cores_why_not(**_sizes(spec, dtype, num_beams)))


def readout_on_tensor_cores(spec: StudentSpec, dtype: torch.dtype) -> bool:
    """Whether `context_readout` rounds activations to `dtype`, for the tensor cores; so does
    `decode_states` where the tensor core kernel decodes."""
    return bool(
        host_library().tensor_cores_read(
            half=dtype != torch.float32,
            factored=spec.num_heads * spec.dim > 2 * spec.attention_dim,
            dim=spec.dim,
            num_heads=spec.num_heads,
            head_dim=spec.attention_dim // spec.num_heads,
            ffn_dim=spec.ffn_dim,
        )
    )


def two_launches_why_not(spec: StudentSpec, dtype: torch.dtype, num_beams: int) -> str:
    """Why a decode of these sizes has no launch of its own for the first stage; "" where it has."""
    plain = tensor_cores_why_not(spec, dtype, num_beams)
    if plain:
        return f"its plain kernel decodes: {plain}"
    if not tensor_core_cuts(spec, dtype, num_beams, launches=2):
        return "many beams or wide codebooks, which one launch decodes"
    if not readout_on_tensor_cores(spec, dtype):
        return "its plain readout takes the attention's sizes"
    return ""


def tensor_core_cuts(
    spec: StudentSpec, dtype: torch.dtype, num_beams: int, launches: int = 1
) -> tuple[Cut, ...]:
    """The cut of each range of batches, of two launches that of the second; () where the plain
    kernel decodes, or where there are no two launches."""
    rows = host_library().tensor_core_cuts(**_sizes(spec, dtype, num_beams), launches=launches)
    return tuple(Cut(*row) for row in rows)


def _sizes(spec: StudentSpec, dtype: torch.dtype, num_beams: int) -> dict[str, Any]:
    return {
        "half": dtype != torch.float32,
        "dim": spec.dim,
        "hidden_dim": spec.hidden_dim,
        "blocks_per_head": spec.blocks_per_head,
        "codes_per_level": spec.codes_per_level,
        "num_beams": num_beams,
    }


def table(cuts: Sequence[Cut]) -> list[str]:
    """The cuts as lines of text, with the measurement that decided each."""
    lines = [
        f"{'batch':>9} {'cluster':>7} {'group':>5} {'blocks/request':>14} {'blocks/SM':>9}  reason "
        "(µs of a graph replay, H200, bf16, 50 beams)"
    ]
    least = 1
    for cut in cuts:
        batch = f"{least}.." + ("" if cut.most_requests >= _ANY else str(cut.most_requests))
        share = Fraction(cut.cluster, cut.group)
        lines.append(
            f"{batch:>9} {cut.cluster:>7} {cut.group:>5} {share!s:>14} {cut.resident:>9}  "
            f"{cut.reason}"
        )
        least = cut.most_requests + 1
    return lines


if __name__ == "__main__":
    print("\n".join(table(tensor_core_cuts(PUBLISHED, torch.bfloat16, num_beams=50))))
