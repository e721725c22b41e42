"""Which settings a sweep tries: values per option of ``sidmlp distill``, and how they combine."""

from __future__ import annotations

import argparse
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence

from .arguments import parse

Grid = Mapping[str, Sequence[str]]
Setting = dict[str, str]  # option without its dashes -> value as it is typed

# Widths as in the paper's sweep (arXiv 2605.12617); the others around the values that it names.
PUBLISHED: Grid = {
    "hidden": ("128", "256", "512", "1024", "2048"),
    "attention": ("128", "256", "512"),
    "blocks": ("1", "2", "3"),
    "dropout": ("0", "0.1", "0.2", "0.3"),
    "alpha": ("0.1", "0.3", "0.5", "0.7", "0.9"),
    "tau": ("1", "2", "4"),
    "lr": ("0.0003", "0.001", "0.003"),
}
SEARCHES = ("grid", "axes", "random")
# Where a run is and how it is started; everything else decides what comes out.
NOT_SETTINGS = ("run", "into", "restart", "threads", "tensorboard")


def values(text: str) -> tuple[str, tuple[str, ...]]:
    """``name=a,b,c`` as (name, (a, b, c)), for argparse."""
    name, equals, rest = text.partition("=")
    name = name.strip().removeprefix("--")
    found = tuple(part.strip() for part in rest.split(","))
    if not equals or not name or not all(found):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE,VALUE,.., got {text!r}")
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected different values, got {text!r}")
    return name, found


def combinations(grid: Grid, search: str, runs: int | None, seed: int) -> Iterator[Setting]:
    """The settings of a search, in a fixed order.

    "grid": every combination; "axes": no change, then every value alone; "random": ``runs``
    different combinations, drawn by ``seed``.
    """
    if search == "axes":
        yield {}
        for name, options in grid.items():
            for value in options:
                yield {name: value}
        return
    every: Iterator[tuple[str, ...]] = itertools.product(*grid.values())
    if search == "random":
        assert runs is not None
        everything = list(every)
        every = iter(random.Random(seed).sample(everything, min(runs, len(everything))))
    for chosen in every:
        yield dict(zip(grid, chosen, strict=True))


def parsed(
    setting: Setting, parser: argparse.ArgumentParser, common: argparse.Namespace
) -> argparse.Namespace:
    """``common`` with the setting's values as ``parser`` reads them; ValueError for wrong ones."""
    refused = [name for name in setting if name.replace("-", "_") in NOT_SETTINGS]
    if refused:
        raise ValueError(f"--set {refused[0]}: this is no setting of a student; leave it out")
    arguments = [f"--{name}={value}" for name, value in setting.items()]
    try:
        return parse(parser, arguments, argparse.Namespace(**vars(common)))
    except ValueError as error:
        raise ValueError(f"--set: {error}; `sidmlp distill --help` lists what can be set") from None


def label(setting: Setting) -> str:
    """A setting in a few words, fit for the name of a directory."""
    text = ",".join(f"{name}={value}" for name, value in setting.items())
    return re.sub(r"[^\w.=,+-]", "_", text) or "base"
