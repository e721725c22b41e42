"""Which kernel the CUDA backend launches, and how it cuts a batch; chosen in csrc/cuda/sm90/cuts.h.

    tensor cores   csrc/cuda/sm90: half-precision weights, one block per head, clusters of blocks
    plain          csrc/cuda: every other size, float32 too; one thread block a request

The choice depends on model and settings, never on the batch, so that a batch never changes a bit.
`python -m sidmlp_kernels.ops.cuda_kernels` prints the cuts and what decided them.
"""

from __future__ import annotations

import torch

from sidmlp_kernels.spec import StudentSpec
from sidmlp_kernels.trie import host_library


def tensor_cores_why_not(spec: StudentSpec, dtype: torch.dtype, num_beams: int) -> str:
    """Why the plain kernel decodes these sizes; "" where the tensor core kernel does.

    It does not know the shared memory that a model needs: the widest of all (such as hidden_dim
    2048 with 1,024 codes on 8 levels) decode with the plain kernel none the less.
    """
    return str(
        host_library().tensor_cores_why_not(
            half=dtype != torch.float32,
            dim=spec.dim,
            hidden_dim=spec.hidden_dim,
            blocks_per_head=spec.blocks_per_head,
            most_codes=max(spec.codes_per_level),
            num_beams=num_beams,
        )
    )


def table() -> str:
    """The cuts as text, one a line, with the measurement that decided each."""
    lines = [f"{'batch up to':>11} {'cluster':>7} {'requests':>8}  reason"]
    for most, cluster, group, reason in host_library().tensor_core_cuts():
        batch = "any" if most >= 2**31 - 1 else most
        lines.append(f"{batch:>11} {cluster:>7} {group:>8}  {reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
