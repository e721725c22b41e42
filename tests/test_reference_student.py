"""The reference student against its equations, written a second time with plain loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from sidmlp.student import Student, StudentConfig

CONFIG = StudentConfig(
    codes_per_level=(7, 5, 9),
    dim=12,
    attention_dim=20,
    num_heads=4,
    ffn_dim=16,
    hidden_dim=14,
    blocks_per_head=2,
    embedding_dim=6,
)


def make_student(seed: int = 0, **changes: object) -> Student:
    torch.manual_seed(seed)
    student = Student(dataclasses.replace(CONFIG, **changes)).double()
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "norm" in name:  # away from 1 and 0, so that a forgotten affine part shows
                weight.add_(0.3 * torch.randn_like(weight))
    return student


def problem(batch: int = 5, tokens: int = 8, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, tokens, CONFIG.dim, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, tokens, generator=generator) < 0.6
    mask[:, 3] = True
    return states, mask


def layer_norm(x: list[float], weight: torch.Tensor, bias: torch.Tensor) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    scale = 1 / math.sqrt(variance + 1e-5)
    pairs = zip(x, weight.tolist(), bias.tolist(), strict=True)
    return [(v - mean) * scale * w + b for v, w, b in pairs]


def matvec(weight: torch.Tensor, x: list[float], bias: torch.Tensor | None = None) -> list[float]:
    offset = [0.0] * len(weight) if bias is None else bias.tolist()
    rows = zip(weight.tolist(), offset, strict=True)
    return [sum(a * b for a, b in zip(row, x, strict=True)) + o for row, o in rows]


def loop_context(w: dict[str, torch.Tensor], states: torch.Tensor, heads: int) -> list[float]:
    """The context of one user with valid states [T, D], T may be 0."""
    dim = len(w["readout.norm1.weight"])
    width = len(w["readout.attention.q_proj.weight"]) // heads
    x = states.tolist()
    mean = [sum(row[i] for row in x) / max(len(x), 1) for i in range(dim)]
    query = matvec(w["readout.query_proj.weight"], mean, w["readout.query_proj.bias"])
    mixed: list[float] = []
    for h in range(heads):
        rows = slice(h * width, (h + 1) * width)
        q = matvec(w["readout.attention.q_proj.weight"][rows], query)
        keys = [matvec(w["readout.attention.k_proj.weight"][rows], s) for s in x]
        values = [matvec(w["readout.attention.v_proj.weight"][rows], s) for s in x]
        scores = [sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(width) for k in keys]
        total = sum(math.exp(s) for s in scores)
        for i in range(width):
            terms = zip(scores, values, strict=True)
            mixed.append(sum(math.exp(s) / total * v[i] for s, v in terms))
    attended = matvec(w["readout.attention.out_proj.weight"], mixed)
    summed = [a + b for a, b in zip(query, attended, strict=True)]
    u = layer_norm(summed, w["readout.norm1.weight"], w["readout.norm1.bias"])
    inner = matvec(w["readout.ffn_in.weight"], u, w["readout.ffn_in.bias"])
    relu = [max(v, 0.0) for v in inner]
    ffn = matvec(w["readout.ffn_out.weight"], relu, w["readout.ffn_out.bias"])
    out = [a + b for a, b in zip(u, ffn, strict=True)]
    return layer_norm(out, w["readout.norm2.weight"], w["readout.norm2.bias"])


def loop_logits(
    w: dict[str, torch.Tensor], context: list[float], prefix: list[int], blocks: int
) -> list[float]:
    head = f"heads.{len(prefix)}"
    x = list(context)
    for level, code in enumerate(prefix):
        x += w[f"embeddings.{level}.weight"][code].tolist()
    for b in range(blocks):
        block = f"{head}.blocks.{b}"
        x = matvec(w[f"{block}.linear.weight"], x, w[f"{block}.linear.bias"])
        x = layer_norm(x, w[f"{block}.norm.weight"], w[f"{block}.norm.bias"])
        x = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]
    return matvec(w[f"{head}.output.weight"], x, w[f"{head}.output.bias"])


def test_context_and_logits_equal_plain_loops() -> None:
    student = make_student()
    states, mask = problem()
    mask[2] = False  # a user without any valid state: p = 0 and a = 0
    codes = torch.tensor([[0, 1, 2], [6, 4, 8], [3, 2, 1], [5, 0, 0], [2, 3, 7]])
    context = student.context(states, mask)
    logits = student(states, mask, codes)
    weights = student.state_dict()
    for b in range(len(states)):
        expected = loop_context(weights, states[b, mask[b]], CONFIG.num_heads)
        assert context[b].tolist() == pytest.approx(expected, abs=1e-12)
        for level in range(3):
            prefix = codes[b, :level].tolist()
            wanted = loop_logits(weights, expected, prefix, CONFIG.blocks_per_head)
            assert logits[level][b].tolist() == pytest.approx(wanted, abs=1e-12)


def test_state_dict_names_and_shapes() -> None:
    dim, attention, ffn, hidden, emb = 12, 20, 16, 14, 6
    expected = {
        "readout.query_proj.weight": (dim, dim),
        "readout.query_proj.bias": (dim,),
        "readout.attention.q_proj.weight": (attention, dim),
        "readout.attention.k_proj.weight": (attention, dim),
        "readout.attention.v_proj.weight": (attention, dim),
        "readout.attention.out_proj.weight": (dim, attention),
        "readout.norm1.weight": (dim,),
        "readout.norm1.bias": (dim,),
        "readout.ffn_in.weight": (ffn, dim),
        "readout.ffn_in.bias": (ffn,),
        "readout.ffn_out.weight": (dim, ffn),
        "readout.ffn_out.bias": (dim,),
        "readout.norm2.weight": (dim,),
        "readout.norm2.bias": (dim,),
        "embeddings.0.weight": (7, emb),
        "embeddings.1.weight": (5, emb),
    }
    for i, codes in enumerate((7, 5, 9)):
        for b, width in enumerate((dim + i * emb, hidden)):
            expected[f"heads.{i}.blocks.{b}.linear.weight"] = (hidden, width)
            for name in ("linear.bias", "norm.weight", "norm.bias"):
                expected[f"heads.{i}.blocks.{b}.{name}"] = (hidden,)
        expected[f"heads.{i}.output.weight"] = (codes, hidden)
        expected[f"heads.{i}.output.bias"] = (codes,)
    got = {name: tuple(weight.shape) for name, weight in make_student().state_dict().items()}
    assert got == expected


def test_masked_states_are_never_read() -> None:
    student = make_student()
    states, mask = problem()
    mask[1] = False
    poisoned = states.masked_fill(~mask[..., None], math.nan)
    assert torch.equal(student.context(states, mask), student.context(poisoned, mask))
    # Nor do they poison the gradient.
    poisoned.requires_grad_(True)
    student.context(poisoned, mask).square().sum().backward()
    assert poisoned.grad is not None
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[~mask] == 0).all()
    assert all(p.grad.isfinite().all() for p in student.readout.parameters())


def test_masked_states_do_not_change_the_context_and_valid_ones_do() -> None:
    student = make_student()
    states, mask = problem()
    longer = torch.cat([torch.randn(5, 4, CONFIG.dim, dtype=torch.float64), states], dim=1)
    longer_mask = torch.cat([torch.zeros(5, 4, dtype=torch.bool), mask], dim=1)
    context = student.context(states, mask)
    torch.testing.assert_close(student.context(longer, longer_mask), context, rtol=0, atol=1e-12)
    longer_mask[0, 0] = True
    changed = (student.context(longer, longer_mask) - context).abs().amax(dim=1)
    assert changed[0] > 1e-3
    assert changed[1:].max() < 1e-12


def test_embeddings_are_frozen_and_the_rest_learns() -> None:
    student = make_student()
    states, mask = problem()
    codes = torch.tensor([[0, 1, 2]] * 5)
    sum(x.square().sum() for x in student(states, mask, codes)).backward()
    for name, weight in student.named_parameters():
        if name.startswith("embeddings."):
            assert not weight.requires_grad
        else:
            assert weight.grad is not None, name
            assert weight.grad.abs().max() > 0, name


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    student = Student(CONFIG, dropout=0.5, attention_dropout=0.5).double()
    states, mask = problem()
    assert not torch.equal(student.context(states, mask), student.context(states, mask))
    student.eval()
    plain = Student(CONFIG).double()
    plain.load_state_dict(student.state_dict())
    assert torch.equal(student.context(states, mask), plain.context(states, mask))


def test_prefix_codes_broadcast_over_beams() -> None:
    student = make_student()
    states, mask = problem(batch=2)
    context = student.context(states, mask)
    prefixes = torch.tensor([[[0, 4], [6, 0], [1, 1]], [[2, 2], [3, 3], [5, 1]]])
    together = student.logits(2, context[:, None], prefixes)
    assert together.shape == (2, 3, 9)
    for b in range(2):
        for w in range(3):
            alone = student.logits(2, context[b], prefixes[b, w])
            torch.testing.assert_close(together[b, w], alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_in_other_dtypes(dtype: torch.dtype) -> None:
    student = make_student()
    states, mask = problem()
    exact = student.context(states, mask)
    rounded = student.to(dtype).context(states.to(dtype), mask)
    assert rounded.dtype == dtype
    bound = 40 * torch.finfo(dtype).eps
    assert (rounded.double() - exact).abs().max() < bound


def test_traces_without_graph_breaks() -> None:
    student = make_student()
    states, mask = problem()
    codes = torch.tensor([[0, 1, 2]] * 5)
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    results = (student(states, mask, codes), compiled(states, mask, codes))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes_per_level": ()}, "codes_per_level"),
        ({"codes_per_level": (3, 0)}, "codes_per_level"),
        ({"num_heads": 3}, "num_heads"),
        ({"blocks_per_head": 0}, "blocks_per_head"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_wrong_inputs_are_refused() -> None:
    student = make_student()
    states, mask = problem()
    with pytest.raises(ValueError, match="states: expected shape"):
        student.context(states[..., :-1], mask)
    with pytest.raises(ValueError, match="mask: expected bool"):
        student.context(states, mask.float())
    with pytest.raises(ValueError, match="mask: expected bool"):
        student.context(states, mask[:, :-1])
