"""Encoder weights as kernels read them: panels for the CPU, rows, tiles, fragments for CUDA."""

from __future__ import annotations

import pytest
import torch
from encoders import SPECS, module_of

from sidmlp_kernels import MLPEncoderSpec, T5Spec
from sidmlp_kernels.encoder import relative_buckets
from sidmlp_kernels.encoder_packing import (
    BIAS_TOKENS,
    PANEL,
    pack_encoder,
    to_fragments,
    to_panels,
    to_tiles,
)
from sidmlp_kernels.packing import round_once


def test_panels_are_groups_of_columns() -> None:
    matrix = torch.arange(5 * 144).reshape(5, 144)
    panels = to_panels(matrix)
    assert panels.numel() == matrix.numel()
    for begin in (0, 64, 128):
        width = min(PANEL, 144 - begin)
        part = panels[begin * 5 : begin * 5 + 5 * width].reshape(5, width)
        assert torch.equal(part, matrix[:, begin : begin + width])


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (6, 9), (4, 2), (64, 20), (32, 1000)])
def test_the_position_bias_is_that_of_every_offset(buckets: int, distance: int) -> None:
    spec = T5Spec(1, 8, 3, 4, 8, 9, relative_buckets=buckets, relative_max_distance=distance)
    module = module_of(spec)
    bias = pack_encoder(module).tensors[1]
    reach = (bias.shape[1] - 1) // 2
    length = 2 * distance + 5
    table = module.state_dict()["block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    wanted = table[relative_buckets(length, buckets, distance)]  # [query, key, heads]
    offsets = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    got = bias[:, offsets.clamp(-reach, reach) + reach].permute(1, 2, 0)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["gated gelu, few buckets", "four roles"])
def test_packing_refuses_what_overflows(name: str) -> None:
    module = module_of(SPECS[name])
    with torch.no_grad():
        module.embed_tokens.weight[3, 1] = 1e6
    with pytest.raises(ValueError, match=r"encoder embed_tokens.weight.*float16"):
        pack_encoder(module, torch.float16)


def test_tiles_are_permuted_as_the_view_says() -> None:
    matrix = torch.arange(128 * 192).reshape(128, 192)
    tiles = to_tiles(matrix).reshape(2, 3, 64, 8, 8)
    for n, k, row, piece in ((0, 0, 0, 0), (1, 2, 63, 7), (0, 1, 13, 2), (1, 0, 6, 5)):
        at = k * 64 + 8 * piece
        wanted = matrix[n * 64 + row, at : at + 8]
        assert torch.equal(tiles[n, k, row, piece ^ (row % 8)], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fragments_are_in_the_order_that_the_view_says(dtype: torch.dtype) -> None:
    matrix = torch.arange(48 * 32).reshape(48, 32).to(dtype)  # fp16 holds integers up to 2,048
    blocks = to_fragments(matrix).reshape(3, 2, 256)
    for n in range(48):
        for k in range(32):
            a, b = n % 16, k % 16
            if dtype == torch.float32:
                at = 64 * (b // 4) + 16 * (a % 8 // 2) + 8 * (a // 8) + 4 * (a % 2) + b % 4
            else:
                at = 8 * (4 * (a % 8) + b % 8 // 2) + 4 * (a // 8) + 2 * (b // 8) + b % 2
            assert blocks[n // 16, k // 16, at] == matrix[n, k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fragments_for_cuda(dtype: torch.dtype) -> None:
    spec = MLPEncoderSpec(2, 3, 20, 33, 60, 30)
    module = module_of(spec)
    packed = pack_encoder(module, dtype, "cuda")
    assert (packed.layout, packed.operator) == ("fragments", "encode_mlp")
    assert packed.sizes == (2, 20, 3, 33, 60, 30)
    w = {name: round_once(t.double(), dtype) for name, t in module.state_dict().items()}
    assert torch.equal(packed.tensors[0][:, :20], w["embed_tokens.weight"])
    assert not packed.tensors[0][:, 20:].any()
    for i in range(2):
        token, mean, vectors, out, bias = packed.tensors[3 + 5 * i : 8 + 5 * i]
        assert vectors.shape == (3, 3, 48)
        assert bias.shape == (3, 32)
        for r in range(3):
            at = f"layers.{i}.roles.{r}."
            linear = w[f"{at}linear_in.weight"]
            padded = torch.zeros(48, 32, dtype=dtype)
            padded[:33, :20] = linear[:, :20]
            assert torch.equal(token[r], to_fragments(padded))
            padded[:33, :20] = linear[:, 20:]
            assert torch.equal(mean[r], to_fragments(padded))
            padded = torch.zeros(32, 48, dtype=dtype)
            padded[:20, :33] = w[f"{at}linear_out.weight"]
            assert torch.equal(out[r], to_fragments(padded))
            wanted = module.state_dict()[f"{at}norm.weight"]
            assert torch.equal(vectors[r, 1, :33], wanted)


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_rows_for_cuda(feed_forward: str) -> None:
    spec = T5Spec(2, 64, 2, 32, 128, 20, feed_forward)
    module = module_of(spec)
    packed = pack_encoder(module, torch.bfloat16, "cuda")
    gated = feed_forward != "relu"
    assert packed.sizes == (2, 64, 2, 32, 128, 20, 3 if gated else 0, BIAS_TOKENS)
    w = {name: round_once(t.double(), torch.bfloat16) for name, t in module.state_dict().items()}
    embedding, bias, final_gain, tiles, *layers = packed.tensors
    assert torch.equal(embedding, w["embed_tokens.weight"])
    assert bias.shape == (2, 2 * BIAS_TOKENS - 1)
    assert torch.equal(final_gain, module.state_dict()["final_layer_norm.weight"])
    matrices = []
    for i in range(2):
        at = f"block.{i}.layer.0.SelfAttention."
        _, qkv, output, _, ffn_in, ffn_out = layers[6 * i : 6 * i + 6]
        assert torch.equal(qkv, torch.cat([w[f"{at}{name}.weight"] for name in "qkv"]))
        assert torch.equal(output, w[f"{at}o.weight"])
        at = f"block.{i}.layer.1.DenseReluDense."
        names = ("wi_0", "wi_1") if gated else ("wi",)
        assert torch.equal(ffn_in, torch.cat([w[f"{at}{name}.weight"] for name in names]))
        assert torch.equal(ffn_out, w[f"{at}wo.weight"])
        matrices += [qkv, output, ffn_in, ffn_out]
    assert torch.equal(tiles, torch.cat([to_tiles(m) for m in matrices]))
    odd = pack_encoder(module_of(T5Spec(1, 48, 2, 32, 128, 20)), torch.float16, "cuda")
    assert odd.tensors[3].numel() == 0  # no tiles of 64 columns


@pytest.mark.parametrize(
    ("most", "taken"), [(82, 128), (128, 128), (129, 192), (192, 192), (193, BIAS_TOKENS)]
)
def test_short_requests_get_a_short_position_bias(most: int, taken: int) -> None:
    """The faster kernel takes them; what both tables hold is the same."""
    module = module_of(T5Spec(1, 64, 2, 32, 128, 20))
    packed = pack_encoder(module, torch.bfloat16, "cuda", most)
    assert packed.max_tokens == packed.sizes[-1] == taken
    whole = pack_encoder(module, torch.bfloat16, "cuda").tensors[1]
    middle = BIAS_TOKENS - 1
    assert torch.equal(packed.tensors[1], whole[:, middle + 1 - taken : middle + taken])
