"""The README's program does what its comments say, and its links lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import numpy as np
import torch

import sidmlp_kernels as sk
from sidmlp.cli import COMMANDS
from sidmlp.cli.tokenizer_options import TOKENIZERS
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


def test_commands_and_options_exist() -> None:
    section = README.split("## On your data")[1].split("\n## ")[0]
    named: dict[str, set[str]] = {}
    for text in re.findall(r"sidmlp [a-z-]+|--[a-z0-9-]+", section):
        if not text.startswith("--"):
            said = named.setdefault(text.split()[1], set())
        else:
            said.add(text)
    assert {"--tokenizer", "--vectors", "--texts", "--given-codes"} <= set().union(*named.values())
    assert "--encoder" in named["import-official"]
    known = {command: options_of(command) for command in COMMANDS if command != "demo"}
    assert named.keys() <= known.keys()
    # Prose about one command names another in between, so an option is one of any command.
    assert set().union(*named.values()) <= set().union(*known.values())
    lines = re.findall(r"^sidmlp ([a-z-]+)(.*)", section, re.MULTILINE)
    for command, rest in lines:
        assert set(re.findall(r"--[a-z-]+", rest)) <= known[command], (command, rest)


def test_every_tokenizer_is_named() -> None:
    for name in TOKENIZERS:
        assert f"`{name}`" in README


def options_of(command: str) -> set[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"sidmlp.cli.{command.replace('-', '_')}").add_arguments(parser)
    return {name for action in parser._actions for name in action.option_strings}
