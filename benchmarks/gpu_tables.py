"""The tables of GPU results, each with a sentence that leads into it.

The sentence belongs to the table because a document shows neither before a GPU was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import HOST_CLOCK
from gpu_axis_tables import AXIS_TABLES, axis_tables
from table_cells import markdown, number_cell, time_cell, times_cell

Report = dict[str, Any]
Row = dict[str, Any]

BEST = "best compiled"
OPERATORS = {
    "beam_decode": "heads and beams alone (`beam_decode`)",
    "decode_states": "readout, heads and beams (`decode_states`)",
}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# Table -> operator, position of the catalogue, L2 cold.
DECODE_GPU = {
    "decode-gpu": ("beam_decode", 0, False),
    "decode-gpu-cold": ("beam_decode", 0, True),
    "decode-gpu-states": ("decode_states", 0, False),
    "decode-gpu-states-cold": ("decode_states", 0, True),
    "decode-gpu-large": ("beam_decode", 1, False),
    "decode-gpu-large-states": ("decode_states", 1, False),
}
# Those that may be missing.
GPU_TABLES = (*DECODE_GPU, "decode-gpu-peers", "decode-gpu-host", *AXIS_TABLES)


def names_of(rows: Sequence[Row], side: str) -> list[str]:
    """Who takes part on one side, in the order of the results."""
    return list(dict.fromkeys(row["name"] for row in rows if row["side"] == side))


def batch_points(report: Report) -> list[Row]:
    """The points that vary the batch alone."""
    return [point for point in report["results"] if point.get("axis", "batch") == "batch"]


def batch_catalogues(report: Report) -> list[str]:
    """The catalogues of these points, the base first."""
    base = report["setting"].get("base", {}).get("catalogue")
    names = dict.fromkeys(point["catalogue"] for point in batch_points(report))
    return sorted(names, key=lambda name: name != base)


def measured(report: Report, operator: str, catalogue: str) -> list[tuple[Row, list[Row]]]:
    """Points of a catalogue in order of batch, each with the operator's rows of one dtype."""
    dtypes = report["setting"]["dtypes"]
    dtype = "bfloat16" if "bfloat16" in dtypes else dtypes[0]
    points = [point for point in batch_points(report) if point["catalogue"] == catalogue]
    return [
        (
            point,
            [
                row
                for row in point["variants"]
                if (row["operator"], row["dtype"]) == (operator, dtype)
                and row.get("timed") != HOST_CLOCK
            ],
        )
        for point in sorted(points, key=lambda point: point["batch"])
    ]


def setting_words(report: Report, catalogue: str) -> str:
    """Weights, beams and catalogue."""
    setting, about = report["setting"], report["catalogues"][catalogue]
    dtypes = setting["dtypes"]
    dtype = DTYPES["bfloat16" if "bfloat16" in dtypes else dtypes[0]]
    return (
        f"{dtype} weights, {setting['num_beams']} beams, {about['items']:,} items ({about['name']})"
    )


def decode_gpu_table(report: Report, operator: str, catalogue: str, cold: bool) -> str | None:
    """One row per batch: the fastest compiled peer, every backend, and how they compare."""
    points = measured(report, operator, catalogue)
    prefix = "cold_" if cold else ""
    p50, faster, best = f"{prefix}p50_us", f"{prefix}times_faster_than", f"{prefix}best_compiled"
    points = [(point, rows) for point, rows in points if any(p50 in row for row in rows)]
    if not points:
        return None
    backends = names_of([row for _, rows in points for row in rows], "backend")
    header = ["batch", "PyTorch, compiled", *backends]
    header += [f"PyTorch / {name}" for name in backends]
    header += [] if cold else [f"users/s, {name}" for name in backends]
    body = []
    for point, rows in points:
        ours = [next((r for r in rows if r["name"] == name), {}) for name in backends]
        peer = next((row[best] for row in ours if best in row), None)
        peer = next((row[p50] for row in rows if row["name"] == peer), None)
        cells = [str(point["batch"]), time_cell(peer)]
        cells += [time_cell(row.get(p50)) for row in ours]
        cells += [times_cell(row.get(faster, {}).get(BEST)) for row in ours]
        if not cold:
            cells += [number_cell(r["users_per_s"]) if r else "-" for r in ours]
        body.append(cells)
    empty = points[0][0]["empty_graph"].get(p50)
    caches = "the L2 cache flushed before each" if cold else "caches warm"
    lead = (
        f"On an {report['gpu']}, {OPERATORS[operator]}, {setting_words(report, catalogue)}, CUDA "
        f"graph replays, {caches}; a graph of one empty kernel takes {time_cell(empty)}. The peer "
        "is plain PyTorch written for speed (`benchmarks/torch_peer.py`), compiled, in a CUDA "
        "graph too:"
    )
    return f"{lead}\n\n{markdown(header, body)}"


def peers_table(report: Report, catalogue: str) -> str | None:
    """Every participant's time for beam_decode."""
    points = measured(report, "beam_decode", catalogue)
    everyone = [row for _, rows in points for row in rows]
    if not everyone:
        return None
    names = names_of(everyone, "peer") + names_of(everyone, "backend")
    body = [
        [
            str(point["batch"]),
            *(
                time_cell(next((r["p50_us"] for r in rows if r["name"] == name), None))
                for name in names
            ),
        ]
        for point, rows in points
    ]
    lead = f"Everyone, `beam_decode`, {setting_words(report, catalogue)}, caches warm:"
    return f"{lead}\n\n{markdown(['batch', *names], body)}"


def host_table(report: Report, catalogue: str) -> str | None:
    """Microseconds of Python for each call."""
    points = [
        point
        for point in sorted(batch_points(report), key=lambda point: point["batch"])
        if point["catalogue"] == catalogue and "host_us" in point
    ]
    if not points:
        return None
    calls = list(dict.fromkeys(call for point in points for call in point["host_us"]))
    body = [
        [f"`{call}`", *(time_cell(point["host_us"].get(call)) for point in points)]
        for call in calls
    ]
    header = ["", *(f"batch {point['batch']}" for point in points)]
    return f"What a call costs Python, {report['gpu']}:\n\n{markdown(header, body)}"


def decode_gpu_tables(report: Report) -> dict[str, str]:
    """Name -> table of bench_decode_gpu's results."""
    catalogues = batch_catalogues(report)
    if not catalogues:
        return axis_tables(report)
    tables: dict[str, str | None] = {
        name: decode_gpu_table(report, operator, catalogues[position], cold)
        for name, (operator, position, cold) in DECODE_GPU.items()
        if position < len(catalogues)
    }
    tables["decode-gpu-peers"] = peers_table(report, catalogues[0])
    tables["decode-gpu-host"] = host_table(report, catalogues[0])
    made = {name: table for name, table in tables.items() if table is not None}
    return made | axis_tables(report)
