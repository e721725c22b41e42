"""How much a decode has to compute and to move: counted from sizes and the catalogue, not measured.

FLOP: a multiply-add is two. The reference computes every code's logit for every beam (dense_flop).
What has to be computed at least (least_flop) follows docs/kernels.md: first layers are sums of a
context's product and prefix-table rows, attention forms no keys and values, levels below the first
compute logits of children only, and an only child needs none. How many beams have several children,
and how many, comes from the exact beams of the judged requests (Walk) in the catalogue's own trie.

Bytes (launch_bytes): each datum once per launch, as if caches held the rest. With B requests,
h beams a request that need a head at a level, c children of these, w beams above, e bytes a weight:

    weights   the readout (decode_states), context product, vectors and blocks; C_1 output rows at
              level 1, min(C_l, B c) below
    tables    min(C_j, B h) rows of H values for each earlier level j
    trie      8 bytes for each of min(nodes, B w) parents, 2 for each of min(nodes, B (c + w - h))
              children; 17 for each of min(items, B k) leaves and their items
    states    B T (D e + 1), or contexts B D 4
    results   B (k (12 + 4 L) + 4)

No implementation can do with less, unless it skips beams by their scores, so time spent on that at
the measured ceilings (gpu_ceilings) is the least there can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decode_checks import Walk

from sidmlp_kernels.packing import PackedWeights
from sidmlp_kernels.spec import StudentSpec
from sidmlp_kernels.trie import CatalogueStatistics


def dense_flop(
    spec: StudentSpec, tokens: int, num_beams: int, operator: str = "decode_states"
) -> float:
    """FLOP of a request in the reference."""
    d, a, f, h = spec.dim, spec.attention_dim, spec.ffn_dim, spec.hidden_dim
    readout = d * d + 2 * d * a + 2 * tokens * (d * a + a) + 2 * d * f
    heads = 0
    for level, codes in enumerate(spec.codes_per_level):
        rows = num_beams if level else 1
        inner = (spec.blocks_per_head - 1) * h * h
        heads += rows * ((d + level * spec.embedding_dim) * h + inner + h * codes)
    return 2.0 * (heads + (readout if operator == "decode_states" else 0))


def least_flop(
    spec: StudentSpec, tokens: int, walk: Walk, operator: str = "decode_states"
) -> float:
    """FLOP of a request with all rewrites: no keys, no first layer, children only.

    An upper bound for kernels that skip beams by the bound on their scores.
    """
    d, a, f, h = spec.dim, spec.attention_dim, spec.ffn_dim, spec.hidden_dim
    absorbed = min(2 * spec.num_heads * d * d, 4 * d * a)
    readout = d * d + absorbed + 2 * spec.num_heads * tokens * d + 2 * d * f
    heads: float = spec.num_levels * d * h
    inner = (spec.blocks_per_head - 1) * h * h
    for level, codes in enumerate(spec.codes_per_level):
        logits = walk.logits_per_level[level] if level else codes
        heads += walk.heads_per_level[level] * inner + logits * h
    return 2.0 * (heads + (readout if operator == "decode_states" else 0))


def launch_bytes(
    packed: PackedWeights,
    catalogue: CatalogueStatistics,
    walk: Walk,
    *,
    batch: int,
    tokens: int,
    num_beams: int,
    k: int,
    operator: str,
) -> dict[str, float]:
    """Bytes of one launch by part, and their "total"; the module docstring has the formula."""
    spec = packed.spec
    element = packed.heads[0].element_size()
    levels, heads = spec.num_levels, packed.heads
    nodes = [1, *(level.nodes for level in catalogue.levels)]
    weights, tables, trie = _bytes(heads[:2]), 0.0, 0.0
    if operator == "decode_states":
        weights += _bytes(packed.readout)
    for level, codes in enumerate(spec.codes_per_level):
        vectors, _, blocks, out_weight, out_bias = heads[2 + 5 * level : 7 + 5 * level]
        branching, children = walk.heads_per_level[level], walk.logits_per_level[level]
        row = out_weight.shape[1] * element
        above = min(num_beams, nodes[level])
        if branching > 0:
            weights += _bytes((vectors, blocks))
            logits = min(codes, batch * children) if level else codes
            weights += logits * (row + out_bias.element_size())
        tables += sum(min(spec.codes_per_level[j], batch * branching) * row for j in range(level))
        trie += 8 * min(nodes[level], batch * above)
        trie += 2 * min(nodes[level + 1], batch * (children + max(0.0, above - branching)))
    trie += 17 * min(catalogue.num_items, batch * k)
    states = batch * tokens * (spec.dim * element + 1)
    parts = {
        "weights": float(weights),
        "tables": float(tables),
        "trie": float(trie),
        "states": float(states if operator == "decode_states" else batch * spec.dim * 4),
        "results": float(batch * (k * (12 + 4 * levels) + 4)),
    }
    return {**parts, "total": sum(parts.values())}


def of_ceilings(
    work: dict[str, Any], seconds: float, ceilings: dict[str, Any], dtype: str
) -> dict[str, float]:
    """What share of the measured rates `work` in `seconds` reaches; "of_ceiling" is the larger one,
    so the least time there can be, divided by `seconds`."""
    found = {"of_copy_rate": work["bytes"]["total"] / seconds / ceilings["copy_bytes_per_s"]}
    if dtype in ceilings["matmul_flop_per_s"]:
        found["of_matmul_rate"] = work["flop"] / seconds / ceilings["matmul_flop_per_s"][dtype]
    return {**found, "of_ceiling": max(found.values())}


def _bytes(tensors: Sequence[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
