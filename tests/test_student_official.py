"""Student: verified weights, and the published flat layout read as the model that it stores."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sidmlp.student import Student as ReferenceStudent
from sidmlp.student import StudentConfig
from sidmlp_kernels.spec import StudentSpec
from sidmlp_kernels.student import Student, weight_shapes

SPEC = StudentSpec(
    codes_per_level=(5, 7, 4),
    dim=12,
    attention_dim=16,
    num_heads=4,
    ffn_dim=20,
    hidden_dim=10,
    embedding_dim=12,
    blocks_per_head=2,
)


def random_weights(spec: StudentSpec, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = weight_shapes(spec).items()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes}


class FurtherBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.norm(self.fc(x)))


class Published(nn.Module):
    """A module whose state dict has the published names, computing the paper's equations."""

    def __init__(
        self,
        codes,
        dim=12,
        attention=16,
        heads=4,
        ffn=20,
        hidden=10,
        blocks=1,
        embedding=12,
        rows=9,
    ) -> None:
        super().__init__()
        self.codes, self.heads = codes, heads
        self.cross_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(dim, attention, bias=False),
                "k_proj": nn.Linear(dim, attention, bias=False),
                "v_proj": nn.Linear(dim, attention, bias=False),
                "out_proj": nn.Linear(attention, dim, bias=False),
            }
        )
        self.query_proj = nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn), nn.ReLU(), nn.Dropout(0.0), nn.Linear(ffn, dim)
        )
        self.embedding = nn.Embedding(1 + sum(codes) + rows, embedding)
        for level, size in enumerate(codes):
            first = [nn.Linear(dim + level * embedding, hidden), nn.LayerNorm(hidden)]
            middle = [FurtherBlock(hidden) for _ in range(blocks - 1)]
            layers = [*first, nn.GELU(), nn.Dropout(0.0), *middle, nn.Linear(hidden, size)]
            self.add_module(f"head{level + 1}", nn.Sequential(*layers))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def forward(self, states: Tensor, mask: Tensor, codes: Tensor) -> list[Tensor]:
        p = torch.stack([x[m].mean(dim=0) for x, m in zip(states, mask, strict=True)])
        q = self.query_proj(p)
        attended = []
        for query, x, m in zip(q, states, mask, strict=True):
            queries, keys, values = (
                self.cross_attn[name](y).unflatten(-1, (self.heads, -1))
                for name, y in (("q_proj", query), ("k_proj", x[m]), ("v_proj", x[m]))
            )
            scores = torch.einsum("hd,thd->ht", queries, keys) / math.sqrt(queries.shape[-1])
            attended.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values).flatten())
        u = self.norm1(q + self.cross_attn["out_proj"](torch.stack(attended)))
        parts = [self.norm2(u + self.ffn(u))]
        logits = []
        offsets = itertools.accumulate(self.codes, initial=1)
        for level, offset in zip(range(len(self.codes)), offsets, strict=False):
            logits.append(getattr(self, f"head{level + 1}")(torch.cat(parts, dim=-1)))
            parts.append(self.embedding(offset + codes[:, level]))
        return logits


@pytest.mark.parametrize(
    ("codes", "sizes"),
    [
        ((5, 7, 4), {}),
        ((6,), {"blocks": 2}),
        ((3, 4), {"blocks": 3, "embedding": 8, "attention": 8, "heads": 2, "rows": 0}),
        ((3, 4, 5, 2, 3, 4, 2, 9), {"hidden": 6}),
        ((256, 256, 256, 256), {}),
    ],
)
def test_published_layout_computes_the_same_logits(codes, sizes) -> None:
    torch.manual_seed(0)
    published = Published(codes, **sizes).double()
    student = Student.from_official(published.state_dict(), num_heads=sizes.get("heads", 4))
    assert student.spec.codes_per_level == codes
    assert student.spec.blocks_per_head == sizes.get("blocks", 1)
    assert student.spec.attention_dim == sizes.get("attention", 16)
    assert student.spec.embedding_dim == sizes.get("embedding", 12)

    reference = ReferenceStudent(StudentConfig(**student.spec.to_dict()))
    reference.load_state_dict(dict(student.weights), strict=True)
    states, mask = torch.randn(6, 9, 12, dtype=torch.float64), torch.rand(6, 9) < 0.6
    mask[:, 0] = True
    prefix = torch.stack([torch.randint(0, c, (6,)) for c in codes], dim=1)
    with torch.no_grad():
        wanted = published(states, mask, prefix)
        got = reference.double()(states, mask, prefix)
    for level in range(len(codes)):
        # the student stores fp32
        torch.testing.assert_close(got[level], wanted[level], rtol=1e-5, atol=1e-5)


def test_offsets_of_the_published_vocabulary() -> None:
    """With 4 x 256 codes the tokens of code 0 are 1, 257 and 513; the last level's is not read."""
    state = Published((256, 256, 256, 256)).state_dict()
    student = Student.from_official(state, num_heads=4)
    for i, token in enumerate((1, 257, 513)):
        rows = state["embedding.weight"][token : token + 256]
        assert torch.equal(student.weights[f"embeddings.{i}.weight"], rows)
    assert "embeddings.3.weight" not in student.weights


def without(name):
    return lambda state: state.pop(name)


def with_value(name, value):
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("norm1.bias"), "missing norm1.bias"),
        (without("query_proj.weight"), "missing query_proj.weight"),
        (without("embedding.weight"), "missing embedding.weight"),
        (without("head2.4.weight"), "missing head2.4.weight"),
        (without("head2.4.bias"), "missing head2.4.bias"),
        (without("head3.1.bias"), "missing head3.1.bias"),
        (without("head1.0.weight"), "missing head1.0.weight"),
        (without("ffn.3.bias"), "missing ffn.3.bias"),
        (with_value("decoder.weight", torch.ones(2)), "unknown decoder.weight"),
        (with_value("head2.2.weight", torch.ones(2)), "unknown head2.2.weight"),
        (with_value("head0.0.weight", torch.ones(2)), "unknown head0.0.weight"),
        (with_value("head5.4.weight", torch.ones(2, 10)), "missing head4.0.bias, head4.0.weight"),
        (with_value("head2.5.weight", torch.ones(7, 10)), "equally many blocks"),
        (with_value("head9.0.weight", torch.ones(7, 10)), "at most, got head9"),
        (
            with_value("head2.1.weight", torch.ones(3)),
            r"head2.1.weight \(expected \[10\], got \[3\]",
        ),
        (with_value("head3.0.weight", torch.ones(10, 12)), r"head3.0.weight \(expected \[10, 36\]"),
        (with_value("cross_attn.k_proj.weight", torch.ones(8, 12)), "misshaped cross_attn.k_proj"),
        (with_value("embedding.weight", torch.ones(16, 12)), "expected at least 17 rows"),
        (with_value("embedding.weight", torch.ones(16)), "misshaped embedding.weight"),
        (with_value("norm2.weight", "text"), "misshaped norm2.weight"),
        (with_value("norm2.weight", torch.full((12,), float("nan"))), "readout.norm2.weight.*nan"),
    ],
)
def test_every_wrong_key_of_the_published_layout_is_named(damage, message) -> None:
    state = dict(Published((5, 7, 4)).state_dict())
    damage(state)
    with pytest.raises(ValueError, match=message):
        Student.from_official(state, num_heads=4)


def test_all_wrong_keys_are_named_at_once() -> None:
    state = dict(Published((5, 7, 4)).state_dict())
    del state["norm1.bias"], state["head3.0.bias"]
    state["extra"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"missing head3.0.bias, norm1.bias; unknown extra"):
        Student.from_official(state, num_heads=4)


@pytest.mark.parametrize("num_heads", [0, 3, 2.0, True, None])
def test_wrong_num_heads(num_heads) -> None:
    with pytest.raises(ValueError, match="num_heads: expected"):
        Student.from_official(Published((5, 7, 4)).state_dict(), num_heads=num_heads)


def test_a_state_dict_is_needed() -> None:
    with pytest.raises(ValueError, match="state_dict: expected a mapping"):
        Student.from_official([1, 2], num_heads=4)
    with pytest.raises(ValueError, match=r"missing .*query_proj"):
        Student.from_official({"model": {}}, num_heads=4)


# -- Student(spec, weights)


def test_names_equal_the_reference_students() -> None:
    for blocks, levels in itertools.product((1, 3), (1, 4)):
        values = SPEC.to_dict() | {"blocks_per_head": blocks, "codes_per_level": [3] * levels}
        reference = ReferenceStudent(StudentConfig(**values)).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in reference.items()}
        assert weight_shapes(StudentSpec.from_dict(values)) == shapes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype_is_stored_as_fp32(dtype) -> None:
    weights = {name: w.to(dtype) for name, w in random_weights(SPEC).items()}
    student = Student(SPEC, weights)
    for name, tensor in student.weights.items():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert torch.equal(tensor, weights[name].float())


def test_the_students_weights_are_its_own() -> None:
    weights = {name: nn.Parameter(w) for name, w in random_weights(SPEC).items()}
    student = Student(SPEC, weights)
    name = "heads.1.output.bias"
    before = student.weights[name].clone()
    with torch.no_grad():
        weights[name].zero_()
    assert torch.equal(student.weights[name], before)
    assert not student.weights[name].requires_grad
    with pytest.raises(TypeError):
        student.weights[name] = before  # type: ignore[index]


def test_it_can_be_copied_and_sent_to_other_processes() -> None:
    student = Student(SPEC, random_weights(SPEC))
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert other.spec == SPEC
        assert all(torch.equal(other.weights[name], w) for name, w in student.weights.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(bad: float) -> None:
    weights = random_weights(SPEC)
    weights["heads.2.blocks.1.norm.bias"][3] = bad
    message = f"heads.2.blocks.1.norm.bias expected finite float32 values, got {bad}"
    with pytest.raises(ValueError, match=message):
        Student(SPEC, weights)


def test_fp64_beyond_fp32_is_not_finite() -> None:
    weights = random_weights(SPEC)
    weights["readout.norm1.bias"] = weights["readout.norm1.bias"].double() * 1e300
    with pytest.raises(ValueError, match=r"readout.norm1.bias expected finite float32"):
        Student(SPEC, weights)


def test_all_problems_are_named_at_once() -> None:
    weights = random_weights(SPEC)
    del weights["readout.ffn_in.bias"]
    weights["embeddings.2.weight"] = torch.ones(4, 12)
    weights["heads.0.output.weight"] = torch.ones(6, 10)
    weights["heads.1.output.weight"] = torch.ones(7, 10, dtype=torch.int64)
    weights["heads.2.output.weight"] = [1.0]
    with pytest.raises(ValueError, match="5 problems") as error:
        Student(SPEC, weights)
    for part in (
        "missing readout.ffn_in.bias [20]",
        "unknown embeddings.2.weight",
        "heads.0.output.weight expected shape [5, 10], got [6, 10]",
        "heads.1.output.weight expected a float dtype, got torch.int64",
        "heads.2.output.weight is no tensor but list",
    ):
        assert part in str(error.value)


def test_arguments_of_another_kind() -> None:
    with pytest.raises(ValueError, match="spec: expected a StudentSpec, got dict"):
        Student(SPEC.to_dict(), random_weights(SPEC))
    with pytest.raises(ValueError, match="expected a mapping of names to tensors, got list"):
        Student(SPEC, [1])


def test_a_cast_that_overflows_names_tensor_value_and_remedy() -> None:
    weights = random_weights(SPEC)
    weights["heads.1.blocks.0.linear.weight"][2, 3] = -70_000.0
    student = Student(SPEC, weights)
    student.check_cast(torch.float32)
    student.check_cast(torch.bfloat16)
    with pytest.raises(ValueError, match=r"heads.1.blocks.0.linear.weight.*-70000.*bfloat16"):
        student.check_cast(torch.float16)
    weights["heads.1.blocks.0.linear.weight"][2, 3] = 3.4e38
    with pytest.raises(ValueError, match=r"heads.1.blocks.0.linear.weight"):
        Student(SPEC, weights).check_cast(torch.bfloat16)
