"""Tables of the axes of bench_decode_gpu, and of everyone with every column at the base point.

    decode-gpu-axes                  all axes but the batch in one table, the faster backend
    decode-gpu-beams, -items, -codes  one axis, every backend
    decode-gpu-everyone-<batch>      every participant at the base point, every column

All of `decode_states`. A table whose points were not measured is not made; what was left out for
want of time stands below its axis.
"""

from __future__ import annotations

from typing import Any

from common import HOST_CLOCK, TWO_LAUNCHES, format_count
from table_cells import markdown, number_cell, percent_cell, time_cell, times_cell

Report = dict[str, Any]
Row = dict[str, Any]

OPERATOR = "decode_states"
AXES = {"beams": "beams", "items": "items", "codes": "codes a level"}
BEST, STATIC = "best compiled", "static"
EVERYONE_BATCHES = (1, 32, 512, 4096)
AXIS_TABLES = (
    "decode-gpu-axes",
    *(f"decode-gpu-{axis}" for axis in AXES),
    *(f"decode-gpu-everyone-{batch}" for batch in EVERYONE_BATCHES),
)
LABELS = {
    "compiled": "PyTorch, compiled",
    "autotuned": "PyTorch, max-autotune",
    "definition": "PyTorch, compiled, weights not folded",
    "static": "STATIC-style masks, compiled",
    "graph": "PyTorch, CUDA graph, no compiler",
    "eager": "PyTorch, eager",
    "reference": "the reference, eager",
    "teacher": "the teacher, Hugging Face `generate`",
}


def main_dtype(report: Report) -> str:
    """The dtype that tables show."""
    dtypes = report["setting"]["dtypes"]
    return "bfloat16" if "bfloat16" in dtypes else dtypes[0]


def decode_rows(report: Report, point: Row) -> dict[str, Row]:
    """Name -> row of `decode_states` in the tables' dtype."""
    dtype = main_dtype(report)
    rows = (r for r in point["variants"] if (r["operator"], r["dtype"]) == (OPERATOR, dtype))
    return {row["name"]: row for row in rows}


def on_gpu(rows: dict[str, Row]) -> dict[str, Row]:
    """Our backends among them, but for the host's."""
    return {
        name: row
        for name, row in rows.items()
        if row["side"] == "backend" and row.get("timed") != HOST_CLOCK
    }


def by_default(rows: dict[str, Row]) -> dict[str, Row]:
    """Those that a caller gets without asking for a form: they alone are on every axis."""
    return {name: row for name, row in on_gpu(rows).items() if name != TWO_LAUNCHES}


def axis_value(report: Report, axis: str, point: Row) -> int:
    """Where a point stands on an axis."""
    if axis == "items":
        return report["catalogues"][point["catalogue"]]["items"]
    return {
        "batch": point["batch"],
        "beams": point["num_beams"],
        "codes": point["codes_per_level"][0],
    }[axis]


def value_cell(axis: str, value: int) -> str:
    """A value of an axis: items rounded, others as they are."""
    return format_count(value) if axis == "items" else str(value)


def axis_points(report: Report, axis: str) -> list[Row]:
    """The points of an axis in ascending order, by value and batch; none in results without axes.

    The base point stands on the axes "batch" and "beams".
    """
    base = report["setting"].get("base")
    if base is None:
        return []
    found = []
    for point in report["results"]:
        is_base = (
            point["axis"] == "batch"
            and point["catalogue"] == base["catalogue"]
            and (axis == "batch" or point["batch"] in base["batches"])
        )
        if (is_base and axis in ("batch", "beams")) or point["axis"] == axis != "batch":
            found.append(point)
    if axis != "batch" and all(point["axis"] == "batch" for point in found):
        return []
    return sorted(found, key=lambda point: (axis_value(report, axis, point), point["batch"]))


def _left_out(report: Report, axis: str) -> str:
    gone = [
        f"{entry['catalogue']}, {entry['num_beams']} beams, batch {entry['batch']} ({entry['why']})"
        for entry in report["left_out"]
        if entry.get("axis") == axis and "name" not in entry
    ]
    return f"\n\nLeft out: {'; '.join(gone)}." if gone else ""


def _setting(report: Report, axis: str, point: Row) -> str:
    """What an axis keeps fixed, for the sentence that leads into its table."""
    about, levels = report["catalogues"][point["catalogue"]], len(point["codes_per_level"])
    beams = f"{point['num_beams']} beams"
    sizes = f"{levels} levels of {point['codes_per_level'][0]} codes"
    return {
        "beams": f"{about['items']:,} items ({about['name']}), {sizes}",
        "items": f"{beams}, {sizes}, uniformly random codes",
        "codes": f"{beams}, {levels} levels, {about['items']:,} items with uniformly random codes",
    }[axis]


def axis_table(report: Report, axis: str) -> str | None:
    """One row per value and batch: peers, every backend, ratios, users per second."""
    points = axis_points(report, axis)
    rows = [decode_rows(report, point) for point in points]
    names = list(dict.fromkeys(name for found in rows for name in by_default(found)))
    if not names:
        return None
    header = [AXES[axis], "batch", "PyTorch, compiled", "STATIC-style", *names]
    header += [f"PyTorch / {name}" for name in names]
    header += [f"STATIC-style / {name}" for name in names]
    header += [f"users/s, {name}" for name in names]
    body = []
    for point, found in zip(points, rows, strict=True):
        ours = [found.get(name, {}) for name in names]
        faster = [row.get("times_faster_than", {}) for row in ours]
        cells = [value_cell(axis, axis_value(report, axis, point)), str(point["batch"])]
        cells += [time_cell(found.get(n, {}).get("p50_us")) for n in ("compiled", STATIC, *names)]
        cells += [times_cell(ratios.get(BEST)) for ratios in faster]
        cells += [times_cell(ratios.get(STATIC)) for ratios in faster]
        cells += [number_cell(row["users_per_s"]) if row else "-" for row in ours]
        body.append(cells)
    # Who was not asked along the axis has no column of dashes.
    kept = [i for i in range(len(header)) if any(cells[i] != "-" for cells in body)]
    header = [header[i] for i in kept]
    body = [[cells[i] for i in kept] for cells in body]
    fixed = _setting(report, axis, points[0])
    lead = f"On an {report['gpu']}, `{OPERATOR}`, {fixed}, caches warm, medians:"
    return f"{lead}\n\n{markdown(header, body)}{_left_out(report, axis)}"


def axes_table(report: Report) -> str | None:
    """One row per value of each axis; for each batch the faster backend and its ratios."""
    made: dict[tuple[str, int], dict[int, Row]] = {}
    for axis in AXES:
        for point in axis_points(report, axis):
            place = (axis, axis_value(report, axis, point))
            made.setdefault(place, {})[point["batch"]] = decode_rows(report, point)
    if not made:
        return None
    batches = report["setting"]["base"]["batches"]
    header = ["axis", "value"]
    for batch in batches:
        header += [f"batch {batch}, ours", "PyTorch / ours", "STATIC-style / ours", "users/s"]
    body = []
    for (axis, value), by_batch in made.items():
        cells = [AXES[axis], value_cell(axis, value)]
        for batch in batches:
            ours = by_default(by_batch.get(batch, {}))
            if not ours:
                cells += ["-"] * 4
                continue
            best = min(ours.values(), key=lambda row: row["p50_us"])
            faster = best.get("times_faster_than", {})
            cells += [
                f"{time_cell(best['p50_us'])} ({best['name']})",
                times_cell(faster.get(BEST)),
                times_cell(faster.get(STATIC)),
                number_cell(best["users_per_s"]),
            ]
        body.append(cells)
    lead = (
        f"On an {report['gpu']}, `{OPERATOR}`, the faster of our backends at each point, and how "
        "many times longer compiled PyTorch and a STATIC-style mask pipeline take (caches warm, "
        "medians):"
    )
    left = "".join(_left_out(report, axis) for axis in AXES)
    return f"{lead}\n\n{markdown(header, body, left=2)}{left}"


def everyone_table(report: Report, batch: int) -> str | None:
    """Every participant at the base point with this batch, every column."""
    point = next((p for p in axis_points(report, "batch") if p["batch"] == batch), None)
    if point is None:
        return None
    rows = decode_rows(report, point)
    ours = on_gpu(rows)
    header = ["", "p50", "one alone: p50", "p99", "users/s"]
    header += [f"/ {name}" for name in ours]
    header += ["of copy rate", "of matrix rate", "J / 1000 users", "invalid"]
    body = []
    for name, row in sorted(rows.items(), key=lambda pair: pair[1]["p50_us"]):
        alone = "single_p50_us" in row
        joules = row.get("joules_per_thousand_users")
        cells = [LABELS.get(name, f"**{name}**"), time_cell(row["p50_us"])]
        cells += [time_cell(row["single_p50_us"] if alone else row["p50_us"])]
        cells += [time_cell(row["single_p99_us"] if alone else row["p99_us"])]
        cells += [number_cell(row["users_per_s"])]
        cells += [times_cell(row["p50_us"] / other["p50_us"]) for other in ours.values()]
        cells += [percent_cell(row.get(share)) for share in ("of_copy_rate", "of_matmul_rate")]
        cells += ["-" if joules is None else number_cell(joules)]
        cells += [percent_cell(row["invalid_rate"])]
        body.append(cells)
    return f"{_everyone_lead(report, point)}\n\n{markdown(header, body)}"


def _everyone_lead(report: Report, point: Row) -> str:
    work, dtype = point["work"][OPERATOR], main_dtype(report)
    ceilings = _ceilings(report)
    about = report["catalogues"][point["catalogue"]]
    rates = f"copies {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s"
    if dtype in ceilings["matmul_flop_per_s"]:
        rate = ceilings["matmul_flop_per_s"][dtype] / 1e12
        rates += f" and multiplies {dtype} matrices at {rate:.0f} TFLOP/s"
    return (
        f"Everyone on an {report['gpu']}, `{OPERATOR}`, batch {point['batch']}, "
        f"{point['num_beams']} beams, {about['items']:,} items ({about['name']}). A decode has to "
        f"move {work[dtype]['total'] / 1e6:.1f} MB and to compute {work['flop'] / 1e9:.2f} GFLOP "
        f"at least ({work['dense_flop'] / 1e9:.1f} with a logit for every code); this GPU {rates}:"
    )


def _ceilings(report: Report) -> dict[str, Any]:
    """Of the run, or of the piece that measured the axis batch."""
    pieces = report.get("pieces", [])
    with_batch = (p["ceilings"] for p in pieces if "batch" in (p.get("axes") or ()))
    return next(with_batch, report["ceilings"])


def axis_tables(report: Report) -> dict[str, str]:
    """Name -> table; empty for results without axes."""
    made: dict[str, str | None] = {"decode-gpu-axes": axes_table(report)}
    made |= {f"decode-gpu-{axis}": axis_table(report, axis) for axis in AXES}
    made |= {
        f"decode-gpu-everyone-{batch}": everyone_table(report, batch) for batch in EVERYONE_BATCHES
    }
    return {name: table for name, table in made.items() if table is not None}
