"""The operators `torch.ops.sidmlp.*`: what each computes, whichever backend runs it.

    beam_decode      context [B, D] fp32                       -> items, scores, codes, counts
    decode_states    states [B, T, D], mask bool [B, T]        -> items, scores, codes, counts
    context_readout  states [B, T, D], mask bool [B, T]        -> context [B, D] fp32
    level_logits     context [B, D] fp32, prefix_codes [B, l]  -> logits [B, C_{l+1}] fp32

States may be float32, bfloat16 or float16; `mask` is True where a state is valid, and other states
are never read. Every tensor is contiguous and on one device.

Results: items int64 [B, k] (-1 past counts), scores float32 [B, k] (-inf past counts), codes int32
[B, k, L] (-1 past counts), counts int32 [B]. Scores descend; ties go to the lower parent rank, then
the lower code; items that share a semantic ID come in catalogue order with one score. A request
whose states, context or logits are not finite has count 0. A request's result has the same bits
whatever else is in the batch.

Lists and numbers, in the order that the makers fix:
    readout, heads   `PackedWeights.readout`, `.heads` (sidmlp_kernels.packing)
    catalogue        `CatalogueSnapshot.trie_tensors` (sidmlp_kernels.trie); contents are trusted
    exclude_ids      int64 [total], ascending inside each request, or None
    exclude_offsets  int64 [B + 1], request b's ids are exclude_ids[offsets[b]:offsets[b + 1]]
    sizes            [L, D, heads, head_dim, F, H, blocks, C_1 .. C_L]
    level_modes      per level 0 (logits of children only) or 1 (of every code); never changes a bit
                     where activations are float32, elsewhere a dense level uses tensor cores and
                     may round otherwise, the same in every batch
    isa              CPU only: 0 auto, 1 plain, 2 AVX2, 3 AVX-512; other backends ignore it

`X_triton` is operator X on Triton, with the same schema; `operator(name, backend)` finds the right
one. With bf16 or fp16 weights it rounds activations to that dtype where a product reads them, and
so do beam_decode and, after its readout, decode_states on CUDA for sizes that tensor cores take
(sidmlp_kernels.ops.cuda_kernels): a context beyond fp16's range counts as not finite there.

Sizes, dtypes, shapes and devices that do not fit raise RuntimeError naming the argument. Users call
these through `Recommender`, which raises ValueError instead.
"""

from sidmlp_kernels.ops.library import SCHEMAS, load, operator

__all__ = ["SCHEMAS", "load", "operator"]
