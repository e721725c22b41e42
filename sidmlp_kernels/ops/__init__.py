"""The operators `torch.ops.sidmlp.*`: what each computes, whichever backend runs it.

    beam_decode      context [B, D] fp32                       -> items, scores, codes, counts
    decode_states    states [B, T, D], mask bool [B, T]        -> items, scores, codes, counts
    context_readout  states [B, T, D], mask bool [B, T]        -> context [B, D] fp32
    level_logits     context [B, D] fp32, prefix_codes [B, l]  -> logits [B, C_{l+1}] fp32
    encode_t5        ids int64 [B, T], mask bool [B, T]        -> states [B, T, D]
    encode_mlp       ids int64 [B, T], mask bool [B, T]        -> states [B, T, D]
    recommend        ids int64 [B, T], mask bool [B, T]        -> items, scores, codes, counts

States may be float32, bfloat16 or float16; `mask` is True where a state is valid, and other states
are never read. Every tensor is contiguous and on one device.

Results: items int64 [B, k] (-1 past counts), scores float32 [B, k] (-inf past counts), codes int32
[B, k, L] (-1 past counts), counts int32 [B]. Scores descend; ties go to the lower parent rank, then
the lower code; items that share a semantic ID come in catalogue order with one score. A request
whose states, context or logits are not finite has count 0. A request's result has the same bits
whatever else is in the batch.

encode_t5 is TIGER's T5 encoder (arXiv 1910.10683, 2305.05065; `sidmlp_kernels.encoder` has the
equations), encode_mlp SID-MLP++'s (arXiv 2605.12617; `sidmlp_kernels.mlp_encoder`). States come in
the dtype of the weights. `mask` is True where a token is valid; a token's position is its column,
holes included. Ids of other tokens are never read and their states are zeros. A request with a
valid id outside the vocabulary has NaN states, so that a decode of them has count 0; other requests
are untouched. Only valid tokens are computed, so padding costs nothing and changes no bit; in one
form (below) neither does the batch. encode_mlp takes at most max_length columns.

recommend is an encoder and decode_states in one call, with the bits of the two; on CUDA one
launch and those of the decode, on the current stream. The length of `encoder_sizes` says which
encoder.

Lists and numbers, in the order that the makers fix:
    readout, heads   `PackedWeights.readout`, `.heads` (sidmlp_kernels.packing)
    encoder          `PackedEncoder.tensors` for the backend (sidmlp_kernels.encoder_packing)
    catalogue        `CatalogueSnapshot.trie_tensors` (sidmlp_kernels.trie); contents are trusted
    exclude_ids      int64 [total], ascending inside each request, or None
    exclude_offsets  int64 [B + 1], request b's ids are exclude_ids[offsets[b]:offsets[b + 1]]
    sizes            [L, D, heads, head_dim, F, H, blocks, C_1 .. C_L]; of the encoders
                     `PackedEncoder.sizes`
    level_modes      per level 0 (logits of children only) or 1 (of every code); never changes a bit
                     where activations are float32, elsewhere a dense level uses tensor cores and
                     may round otherwise, the same in every batch
    launches         of a decode on CUDA: 1, or 2, which has the bits of 1 and takes workspace of
                     4 (L H + C_1) bytes a request; tensor core kernels alone have it. Other
                     backends take 1
    form             of an encoder: 1 throughput, 16 a thread block for each request, 2, 4 or 8 of
                     them, 0 chosen by batch;
                     forms of encode_t5 differ by roundings, those of encode_mlp (at most a block
                     for each role) in no bit. The CPU has one form, and so has Triton
    isa              CPU only: 0 auto, 1 plain, 2 AVX2, 3 AVX-512, 4 AVX-512 with products of
                     bfloat16; other backends ignore it. The last differs from 3 in encoders with
                     bf16 weights: products round what they read to bf16 and accumulate in fp32

`X_triton` is operator X on Triton, with the same schema; `operator(name, backend)` finds the right
one. With bf16 or fp16 weights it rounds activations to that dtype where a
product reads them, and so do beam_decode, decode_states and context_readout on CUDA for sizes that
tensor cores take (sidmlp_kernels.ops.cuda_kernels): a state or context beyond fp16's range counts
as not finite there. encode_t5 on CUDA takes at most sizes[-1] columns of ids.

Sizes, dtypes, shapes and devices that do not fit raise RuntimeError naming the argument. Users call
these through `Recommender`, which raises ValueError instead.
"""

from sidmlp_kernels.ops.library import SCHEMAS, load, operator

__all__ = ["SCHEMAS", "load", "operator"]
