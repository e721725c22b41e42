"""Packing: tables equal the fp64 product rounded once; layout; overflow; algebra."""

from __future__ import annotations

import math

import pytest
import torch
from parity import DTYPES, student_of

from sidmlp_kernels.packing import LANE, pack, round_once
from sidmlp_kernels.student import Student
from sidmlp_kernels.testing import PackedModel, Problem, make_problem

SIZES = (9, 17, 5, 4)
FORMS = {"products": 256, "factored": 40}  # attention width of either attention form


def make(form: str = "products", blocks: int = 2) -> Problem:
    return make_problem(
        SIZES,
        seed=7,
        dim=72,
        attention_dim=FORMS[form],
        embedding_dim=24,
        hidden_dim=100,
        blocks_per_head=blocks,
    )


def doubles(problem: Problem) -> dict[str, torch.Tensor]:
    return {name: weight.double() for name, weight in problem.weights.items()}


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 rounded to nearest even once: by numpy, for bfloat16 on the bits (normal numbers).

    torch's own conversion goes through float32 and rounds twice.
    """
    if dtype != torch.bfloat16:
        name = {torch.float32: "float32", torch.float16: "float16"}[dtype]
        return torch.from_numpy(exact.numpy().astype(name))
    bits = exact.contiguous().view(torch.int64)
    kept = bits + (1 << 44) - 1 + (bits >> 45 & 1) >> 45 << 45  # 7 of 52 bits of mantissa
    return kept.view(torch.float64).to(dtype)


def assert_rounded_once(packed: torch.Tensor, exact: torch.Tensor, width: int) -> None:
    """The first `width` columns are `exact` in fp64, rounded once; the rest is zero."""
    assert packed.shape[-1] % LANE == 0
    assert torch.equal(packed[..., :width], rounded(exact, packed.dtype))
    assert not packed[..., width:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefix_tables_are_the_product_rounded_once(dtype: str) -> None:
    problem = make()
    weights, packed = doubles(problem), problem.packed(DTYPES[dtype])
    for level in range(4):
        table = packed.heads[2 + 5 * level + 1]
        assert table.dtype == DTYPES[dtype]
        assert len(table) == sum(SIZES[:level])
        first = weights[f"heads.{level}.blocks.0.linear.weight"]
        row = 0
        for j in range(level):
            part = first[:, 72 + 24 * j : 72 + 24 * (j + 1)]
            exact = weights[f"embeddings.{j}.weight"] @ part.T
            assert_rounded_once(table[row : row + SIZES[j]], exact, 100)
            row += SIZES[j]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_once(dtype: str) -> None:
    """Also where rounding to float32 on the way makes or breaks a tie."""
    low = DTYPES[dtype]
    steps = torch.tensor([1.0, 2.0**-7, 2.0**-8, 2.0**-10, 2.0**-11, 2.0**-24], dtype=torch.float64)
    crumbs = torch.tensor([0.0, 2.0**-30, -(2.0**-30), 2.0**-40], dtype=torch.float64)
    ones = 1 + (steps[:, None, None] + steps[:, None])[..., None] + crumbs
    drawn = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = torch.cat([ones.flatten(), -ones.flatten(), drawn, torch.zeros(1, dtype=torch.float64)])
    assert torch.equal(round_once(exact, low), rounded(exact, low))
    if low != torch.float32:
        assert not torch.equal(exact.to(low), rounded(exact, low)), "the test must tell them apart"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding_the_factors_first_would_show(dtype: str) -> None:
    """The exact product and the product of rounded factors differ, so the test above can fail."""
    problem = make()
    weights, low = doubles(problem), DTYPES[dtype]
    part = weights["heads.1.blocks.0.linear.weight"][:, 72:96].to(low).double()
    twice = (weights["embeddings.0.weight"].to(low).double() @ part.T).to(low)
    assert not torch.equal(twice, problem.packed(low).heads[2 + 5 + 1][:, :100])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_products_are_rounded_once(dtype: str) -> None:
    problem = make("products")
    weights, packed = doubles(problem), problem.packed(DTYPES[dtype])
    _, _, score_in, score_out, value_in, value_out, *_ = packed.readout
    assert score_in.numel() == value_out.numel() == 0
    at, d = "readout.attention.", 64
    dim_pad = score_out.shape[1] // 4
    for h in range(4):
        rows = slice(h * d, (h + 1) * d)
        q, k, v = (weights[f"{at}{p}_proj.weight"][rows] for p in "qkv")
        o = weights[f"{at}out_proj.weight"][:, rows]
        own = score_out[:, h * dim_pad : (h + 1) * dim_pad]
        # Two fp64 sums in another order may round to neighbours: compare before rounding.
        for stored, exact in ((own, q.T @ k / math.sqrt(d)), (value_in[72 * h :][:72], (o @ v).T)):
            assert stored.dtype == DTYPES[dtype]
            assert not stored[:, 72:].any()
            half_ulp = torch.finfo(DTYPES[dtype]).eps / 2 * exact.abs() * (1 + 1e-6)
            tiny = torch.finfo(DTYPES[dtype]).smallest_normal
            assert bool(((stored[:, :72].double() - exact).abs() <= half_ulp + tiny / 2**9).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_factored_attention_keeps_the_weights(dtype: str) -> None:
    problem = make("factored")
    weights, packed = doubles(problem), problem.packed(DTYPES[dtype])
    _, _, score_in, score_out, value_in, value_out, *_ = packed.readout
    at = "readout.attention."
    for stored, name in ((score_in, "q"), (value_in, "v")):
        per_head = stored.view(72, 4, -1)
        exact = weights[f"{at}{name}_proj.weight"].view(4, 10, 72).permute(2, 0, 1)
        assert_rounded_once(per_head, exact, 10)
    assert_rounded_once(score_out, weights[f"{at}k_proj.weight"] / math.sqrt(10), 72)
    assert_rounded_once(value_out, weights[f"{at}out_proj.weight"].T, 72)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_matrices_are_the_weights_rounded_once(dtype: str, form: str) -> None:
    problem = make(form)
    w, packed = doubles(problem), problem.packed(DTYPES[dtype])
    readout, heads = packed.readout, packed.heads
    assert_rounded_once(readout[0], w["readout.query_proj.weight"].T, 72)
    assert_rounded_once(readout[6], w["readout.ffn_in.weight"].T, 144)
    assert_rounded_once(readout[8], w["readout.ffn_out.weight"].T, 72)
    hidden_pad = heads[0].shape[1] // 4
    for i in range(4):
        first = w[f"heads.{i}.blocks.0.linear.weight"][:, :72].T
        assert_rounded_once(heads[0][:, i * hidden_pad : (i + 1) * hidden_pad], first, 100)
        _, _, blocks, out_weight, out_bias = heads[2 + 5 * i : 7 + 5 * i]
        assert_rounded_once(blocks[0], w[f"heads.{i}.blocks.1.linear.weight"].T, 100)
        codes = len(out_bias)
        assert out_weight.shape[0] == -(-codes // 32) * 32
        assert not out_weight[codes:].any()
        assert_rounded_once(out_weight[:codes], w[f"heads.{i}.output.weight"], 100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_stay_float32_to_the_bit(dtype: str) -> None:
    problem = make()
    packed = problem.packed(DTYPES[dtype])
    names = ("query_proj.bias", "norm1.weight", "norm1.bias", "ffn_out.bias")
    rows = [*names, "norm2.weight", "norm2.bias"]
    for row, name in zip(packed.readout[1], rows, strict=True):
        assert torch.equal(row[:72], problem.weights[f"readout.{name}"])
    hidden_pad = packed.heads[0].shape[1] // 4
    for i in range(4):
        vectors, _, _, _, out_bias = packed.heads[2 + 5 * i : 7 + 5 * i]
        at = f"heads.{i}.blocks."
        rows = ["0.norm.weight", "0.norm.bias", "1.linear.bias", "1.norm.weight", "1.norm.bias"]
        for row, name in zip(vectors, rows, strict=True):
            assert torch.equal(row[:100], problem.weights[at + name])
        bias = packed.heads[1][i * hidden_pad :][:100]
        assert torch.equal(bias, problem.weights[f"{at}0.linear.bias"])
        assert torch.equal(out_bias, problem.weights[f"heads.{i}.output.bias"])
    for tensor in (packed.readout[1], packed.readout[7], packed.heads[1]):
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_packed_weights_mean_the_student(form: str) -> None:
    """Evaluated in fp64, packed fp32 weights give the reference up to one rounding of each."""
    problem = make(form, blocks=3)
    exact, model = student_of(problem), PackedModel(problem.packed())
    context = exact.context(problem.states.double(), problem.mask)
    packed_context = model.context(problem.states.double(), problem.mask)
    assert float((packed_context - context).abs().max()) < 2e-6
    prefix = torch.tensor([[1, 2, 3], [8, 16, 4], [0, 0, 0], [4, 9, 1]])
    for level in range(4):
        difference = model.logits(level, context, prefix) - exact.logits(level, context, prefix)
        assert float(difference.abs().max()) < 2e-6 * 20  # logits reach some tens


def test_sizes_and_bytes() -> None:
    packed = make().packed(torch.bfloat16)
    assert packed.sizes == (4, 72, 4, 64, 144, 100, 2, *SIZES)
    tensors = (*packed.readout, *packed.heads)
    assert packed.num_bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert all(t.is_contiguous() for t in tensors)


class TestOverflow:
    def test_a_product_that_float16_cannot_hold(self) -> None:
        problem = make()
        weights = dict(problem.weights)
        weights["embeddings.0.weight"] = weights["embeddings.0.weight"] * 1000
        name = "heads.1.blocks.0.linear.weight"
        weights[name] = weights[name] * 1000
        student = Student(problem.spec, weights)
        student.check_cast(torch.float16)  # every weight fits, their product does not
        with pytest.raises(ValueError, match=r"heads\.1 prefix table.*float16.*bfloat16"):
            pack(student, torch.float16)
        pack(student, torch.bfloat16)

    def test_an_attention_product(self) -> None:
        problem = make("products")
        weights = dict(problem.weights)
        for part in ("q", "k"):
            name = f"readout.attention.{part}_proj.weight"
            weights[name] = weights[name] * 5000
        with pytest.raises(ValueError, match=r"W_q.*float16"):
            pack(Student(problem.spec, weights), torch.float16)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        with pytest.raises(ValueError, match=r"dtype: expected float32, bfloat16 or float16"):
            pack(make().student, dtype)
