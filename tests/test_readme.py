"""The README's program does what its comments say, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

import sidmlp_kernels as sk
from sidmlp_kernels.student import weight_shapes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def save_student(directory: Path) -> None:
    """A student with random weights, an encoder and items 1..1682, as the demo's."""
    torch.manual_seed(0)
    spec = sk.StudentSpec((16, 16, 16), 16, 16, 2, 32, 32, 16)
    tokens = sk.TokenSpec.for_codes(spec.codes_per_level)
    weights = {name: torch.randn(shape) for name, shape in weight_shapes(spec).items()}
    codes = np.random.default_rng(0).integers(0, 16, (1682, 3))
    catalogue = sk.Catalogue.from_codes(codes, np.arange(1, 1683), spec.codes_per_level)
    encoder = sk.T5Encoder(sk.T5Spec(1, 16, 2, 8, 32, tokens.vocab_size))
    model = sk.Recommender(sk.Student(spec, weights), catalogue, encoder, "cpu", tokens=tokens)
    model.save_pretrained(directory)


def test_the_program_runs(tmp_path: Path) -> None:
    save_student(tmp_path / "student")
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "runs/demo/student" in program
    scope: dict = {}
    exec(program.replace("runs/demo/student", str(tmp_path / "student")), scope)
    recs, model = scope["recs"], scope["model"]
    assert recs.items.shape == (3, 10)
    assert recs.items.dtype == torch.int64
    assert recs.counts.tolist() == [10, 10, 10]
    assert not set(recs.items[0].tolist()) & {50, 172, 181}
    assert bool((recs.scores[:, 1:] <= recs.scores[:, :-1]).all())
    after = model.decode(scope["batch"], k=10, num_beams=50)
    assert after.catalogue_version != recs.catalogue_version
    assert int(after.items.max()) <= 500
    again = model.batch([[50, 172, 181], [1, 95], []])  # ids keep their codes through the swap
    assert torch.equal(again.ids, scope["batch"].ids)


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(((?!https?:)[^)#]+)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
