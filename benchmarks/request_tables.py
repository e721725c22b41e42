"""The tables of bench_requests, each with a sentence that leads into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from table_cells import markdown, number_cell, percent_cell, time_cell, times_cell

Report = dict[str, Any]
Row = dict[str, Any]

REQUEST_TABLES = (
    "requests-gpu",
    "requests-gpu-long",
    "requests-gpu-mlp",
    "requests-gpu-host",
    "requests-cpu",
)
# Histories whose points have an encoder, and so a table, of their own.
OTHER_SETTINGS = ("long", "mlp")
PEERS = ("compiled", "plain")  # the one to compare with first
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def sorted_points(report: Report, other: str = "") -> list[Row]:
    """Full histories first, each kind in order of batch; or those of another setting alone."""
    kinds = {point["histories"] for point in report["results"]}
    wanted = {other} if other else kinds.difference(OTHER_SETTINGS)
    points = [point for point in report["results"] if point["histories"] in wanted]
    return sorted(points, key=lambda p: (p["histories"] != "full", p["batch"]))


def _count_cell(value: float | None) -> str:
    return "-" if value is None else number_cell(value)


def row_of(point: Row, operator: str, name: str, dtype: str | None = None) -> Row:
    """A participant's row; an empty one where it did not take part."""
    return next(
        (
            row
            for row in point["variants"]
            if (row["operator"], row["name"]) == (operator, name) and dtype in (None, row["dtype"])
        ),
        {},
    )


def peer_of(point: Row, operator: str) -> Row:
    """The peer to compare with: the compiled one where there is one."""
    return next((row for name in PEERS if (row := row_of(point, operator, name))), {})


def history_cell(point: Row) -> str:
    """Which histories, and how long they are."""
    return f"{point['histories']}, {number_cell(point['mean_tokens'])} tokens"


def words(report: Report, other: str = "") -> str:
    """The model and its search."""
    setting = report["setting"]
    encoder = (setting[other] if other else setting)["encoder"]
    about = next(iter(report["catalogues"].values()))
    kind = "T5" if "ffn_dim" in encoder else "SID-MLP++"
    return (
        f"{kind} encoder of {encoder['num_layers']} layers, D {encoder['dim']}, "
        f"{setting['num_beams']} beams, {about['items']:,} items ({about['name']})"
    )


def gpu_table(report: Report, backend: str, other: str = "") -> str | None:
    """One row per batch and kind of histories."""
    every = sorted_points(report, other)
    points = [point for point in every if row_of(point, "whole", backend)]
    if not points:
        return None
    header = [
        "histories",
        "batch",
        "encoder, PyTorch",
        f"encoder, {backend}",
        "whole, PyTorch",
        f"whole, {backend}",
        f"PyTorch / {backend}",
        "users/s",
        "of the arithmetic limit",
        "J per 1,000 users",
        "PyTorch's J",
    ]
    body = []
    for point in points:
        ours, peer = row_of(point, "whole", backend), peer_of(point, "whole")
        mark = "" if peer.get("name") != "plain" else " (not compiled)"
        joules = [row.get("joules_per_thousand_users") for row in (ours, peer)]
        faster = ours["times_faster_than"].get(peer.get("name"))
        body.append(
            [
                history_cell(point),
                str(point["batch"]),
                time_cell(peer_of(point, "encoder").get("p50_us")),
                time_cell(row_of(point, "encoder", backend).get("p50_us")),
                time_cell(peer.get("p50_us")) + mark,
                time_cell(ours["p50_us"]),
                times_cell(faster),
                number_cell(ours["users_per_s"]),
                percent_cell(ours["of_arithmetic_limit"]),
                *("-" if value is None else number_cell(value) for value in joules),
            ]
        )
    lead = (
        f"On an {report['gpu']}, token ids to items, {words(report, other)}, CUDA graph "
        "replays. The peer is the plain encoder and `benchmarks/torch_peer.py`, compiled for "
        f"batches of requests padded to one length. The arithmetic limit is {limit_words(points)}"
    )
    return f"{lead}{power_words(points, backend)}:\n\n{markdown(header, body)}"


def limit_words(points: list[Row]) -> str:
    """Of a request of the longest of `points`."""
    point = max(points, key=lambda p: p["mean_tokens"])
    limit = point["arithmetic_limit_us"]["whole"] / point["batch"]
    return f"{limit:.2g} µs a user of {number_cell(point['mean_tokens'])} tokens"


def power_words(points: list[Row], backend: str) -> str:
    """Where the power cap held the clocks, for the sentence before the table."""
    states = {
        f"{point['batch']} ({point['histories']})": row_of(point, "whole", backend)["power"]
        for point in points
        if "power" in row_of(point, "whole", backend)
    }
    if not states:
        return ""
    limit = next(iter(states.values()))["limit_w"]
    capped = [where for where, power in states.items() if power["power_capped"]]
    if not capped:
        return f"; the cap of {number_cell(limit)} W held no batch back"
    return f"; the cap of {number_cell(limit)} W held the clocks at batch {', '.join(capped)}"


HOST_COLUMNS: tuple[tuple[str, Callable[[Row], Any], Callable[[Any], str]], ...] = (
    ("p50", lambda h: h["p50_us"], time_cell),
    ("p99", lambda h: h["p99_us"], time_cell),
    ("`batch`", lambda h: h["parts_p50_us"]["batch"], time_cell),
    ("`decode`", lambda h: h["parts_p50_us"]["decode"], time_cell),
    ("items to lists", lambda h: h["parts_p50_us"]["items"], time_cell),
    ("graph, p50", lambda h: h.get("graphs", {}).get("p50_us"), time_cell),
    ("graph, p99", lambda h: h.get("graphs", {}).get("p99_us"), time_cell),
    ("users/s, one by one", lambda h: h["users_per_s"], _count_cell),
    ("graph", lambda h: h.get("graphs", {}).get("users_per_s"), _count_cell),
    ("overlapped", lambda h: h.get("overlapped_users_per_s"), _count_cell),
    ("stream", lambda h: h.get("stream_users_per_s"), _count_cell),
    ("stream of graphs", lambda h: h.get("graphs", {}).get("stream_users_per_s"), _count_cell),
)


def host_table(report: Report) -> str | None:
    """Calls from lists to lists; with the columns that something was measured for."""
    every = [
        (point, key, host)
        for point in sorted_points(report)
        for key, host in point.get("host", {}).items()
    ]
    if not every:
        return None
    columns = [c for c in HOST_COLUMNS if any(c[1](host) is not None for _, _, host in every)]
    body = [
        [
            history_cell(point),
            str(point["batch"]),
            key.rsplit("-", 1)[0] + ", " + DTYPES[key.rsplit("-", 1)[1]],
            *(cell(value(host)) for _, value, cell in columns),
        ]
        for point, key, host in every
    ]
    header = ["histories", "batch", "backend", *(name for name, _, _ in columns)]
    lead = (
        "What one Python process waits for, from lists of item ids to lists of items: `batch`, "
        "`decode`, and the items as lists, which waits for the device"
    )
    if any("graphs" in host for _, _, host in every):
        lead += (
            "; `capture_requests(..).recommend_lists` replays a graph; streams are `decode_stream`"
        )
    return f"{lead}:\n\n{markdown(header, body, left=1)}"


def cpu_table(report: Report) -> str | None:
    """One row per batch and kind of histories on the CPU."""
    dtypes = report["setting"]["dtypes"]
    points = [point for point in sorted_points(report) if row_of(point, "whole", "cpu")]
    if not points:
        return None
    peer_dtype = DTYPES[dtypes[0]]
    header = ["histories", "batch", f"encoder, PyTorch {peer_dtype}"]
    header += [f"encoder, {DTYPES[d]}" for d in dtypes]
    header += [f"whole, PyTorch {peer_dtype}", *(f"whole, {DTYPES[d]}" for d in dtypes)]
    header += [f"PyTorch / {DTYPES[d]}" for d in dtypes]
    body = []
    for point in points:
        peer = peer_of(point, "whole")
        ours = [row_of(point, "whole", "cpu", dtype) for dtype in dtypes]
        encoders = [row_of(point, "encoder", "cpu", dtype) for dtype in dtypes]
        ratios = [row.get("times_faster_than", {}).get(peer.get("name")) for row in ours]
        body.append(
            [
                history_cell(point),
                str(point["batch"]),
                time_cell(peer_of(point, "encoder").get("p50_us")),
                *(time_cell(row.get("p50_us")) for row in encoders),
                time_cell(peer.get("p50_us")),
                *(time_cell(row.get("p50_us")) for row in ours),
                *(times_cell(ratio) for ratio in ratios),
            ]
        )
    lead = (
        f"Whole requests on a CPU, token ids to items, {words(report)}, against the reference "
        "under torch.compile, requests padded to one length"
    )
    return f"{lead}:\n\n{markdown(header, body)}"


def requests_gpu_tables(report: Report) -> dict[str, str]:
    """Name -> table of bench_requests on a GPU; of the first backend."""
    backend = report["setting"]["backends"][0]
    tables = {
        "requests-gpu": gpu_table(report, backend),
        **{f"requests-gpu-{other}": gpu_table(report, backend, other) for other in OTHER_SETTINGS},
        "requests-gpu-host": host_table(report),
    }
    return {name: table for name, table in tables.items() if table is not None}


def requests_cpu_tables(report: Report) -> dict[str, str]:
    """Name -> table of bench_requests --device cpu."""
    table = cpu_table(report)
    return {} if table is None else {"requests-cpu": table}
