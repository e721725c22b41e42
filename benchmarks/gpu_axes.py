"""The points of bench_decode_gpu: from a base point one thing varies at a time.

    batch   requests, on every real catalogue: both operators and all peers
    items   catalogues of uniformly random codes, levels and codes as the base
    beams   num_beams
    codes   codebook sizes at three levels, uniformly random, as many items as Beauty has

Axes but "batch" measure `decode_states` beside AXIS_PEERS, at the base's batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common import format_count, system_memory
from decode_catalogues import REAL, ItemCodes, load_catalogue, uniform_catalogue
from decode_variants import Contest
from gpu_options import AXES, Options
from gpu_participants import OPERATORS

EXTRA_PEERS = ("autotuned", "definition")  # slow to compile: only where EXTRA_BATCHES say
EXTRA_BATCHES = (32, 512)
TEACHER_BATCHES = (1, 32, 512)
ENERGY_BATCHES = (1, 32, 512, 4096)
AXIS_PEERS = ("compiled", "static", "reference")

LIBRARY_TRIE = 2_000_000  # from so many items on the reference takes the library's trie
# What building reference and kernel takes at most, measured from 1 to 20 million items.
BYTES_PER_ITEM = 400


@dataclass(frozen=True)
class Point:
    """One measurement.

    catalogue   a folder of REAL, or "uniform-<items>-<codes>x.."
    num_items   of a uniform catalogue
    """

    axis: str
    catalogue: str
    batch: int
    num_beams: int
    codes_per_level: tuple[int, ...]
    num_items: int = 0
    operators: tuple[str, ...] = OPERATORS
    peers: tuple[str, ...] = ()
    energy: bool = False

    @property
    def where(self) -> dict[str, object]:
        """What tells a point from others, for a report."""
        return {
            "catalogue": self.catalogue,
            "batch": self.batch,
            "num_beams": self.num_beams,
            "codes_per_level": list(self.codes_per_level),
        }

    def __str__(self) -> str:
        return f"{self.catalogue} batch {self.batch} beams {self.num_beams}"


def make_points(options: Options) -> list[Point]:
    """All points, the most important first: the base catalogue's batches, then axis by axis, then
    the batches of further catalogues."""
    sizes, beams = tuple(options.sizes["codes_per_level"]), options.num_beams
    base = options.base_catalogue
    quiet = tuple(name for name in options.peers if name in AXIS_PEERS)

    def on_axis(
        axis: str, catalogue: str, num_beams: int, codes: tuple[int, ...], items: int
    ) -> list[Point]:
        return [
            Point(axis, catalogue, batch, num_beams, codes, items, ("decode_states",), quiet)
            for batch in options.base_batches
        ]

    batches = [
        Point(
            "batch",
            name,
            batch,
            beams,
            sizes,
            peers=batch_peers(options, name == base, batch),
            energy=options.energy and name == base and batch in ENERGY_BATCHES,
        )
        for name in options.catalogues
        for batch in options.batches
    ]
    found: dict[str, list[Point]] = {axis: [] for axis in AXES}
    found["batch"] = [point for point in batches if point.catalogue == base]
    for items in options.items:
        found["items"] += on_axis("items", uniform_name(items, ()), beams, sizes, items)
    for width in options.beams:
        if width != beams:
            found["beams"] += on_axis("beams", base, width, sizes, 0)
    for count in options.codes:
        codes = (count,) * options.code_levels
        name = uniform_name(options.code_items, codes)
        found["codes"] += on_axis("codes", name, beams, codes, options.code_items)
    found["others"] = [point for point in batches if point.catalogue != base]
    wanted = [*options.axes, *(["others"] if "batch" in options.axes else [])]
    return [point for axis in wanted for point in found[axis]]


def batch_peers(options: Options, base: bool, batch: int) -> tuple[str, ...]:
    """Who takes part on the axis "batch"."""
    extra = EXTRA_PEERS if base and batch in EXTRA_BATCHES and not options.quick else ()
    teacher = ("teacher",) if base and batch in TEACHER_BATCHES and not options.quick else ()
    skipped = {*EXTRA_PEERS, "teacher"} - {*extra, *teacher}
    return tuple(name for name in options.peers if name not in skipped)


def uniform_name(items: int, codes_per_level: Sequence[int]) -> str:
    """A uniform catalogue's key in a report; codes only where they are not the base's."""
    name = f"uniform-{format_count(items)}"
    return f"{name}-{'x'.join(map(str, codes_per_level))}" if codes_per_level else name


def items_of(point: Point, options: Options) -> ItemCodes:
    """The point's catalogue; MemoryError where this machine cannot hold it."""
    if point.catalogue in REAL:
        return load_catalogue(point.catalogue, options.data)
    needed, free = point.num_items * BYTES_PER_ITEM, system_memory("MemAvailable")
    if needed > 0.9 * free:
        raise MemoryError(
            f"reference and kernel need up to {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        )
    return uniform_catalogue(point.num_items, point.codes_per_level)


def contest_of(points: Sequence[Point], options: Options) -> Contest:
    """The contest of points that share a catalogue.

    States are rounded to bf16, so that every dtype of weights starts from the same numbers.
    """
    first = points[0]
    items = items_of(first, options)
    contest = Contest(
        items,
        max(point.batch for point in points),
        sizes={**options.sizes, "codes_per_level": first.codes_per_level},
        tokens=options.tokens,
        k=options.k,
        own_trie=items.num_items < LIBRARY_TRIE,
    )
    contest.states = contest.states.bfloat16().float()
    return contest
