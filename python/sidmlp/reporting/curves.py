"""Loss and metric curves of a training as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sidmlp.data.files import write_atomically

from .training_log import scalar_names

# One panel each, those of them that a training has numbers of.
PANELS = ("loss", "score", "learning_rate", "gradient_norm")
PANEL_INCHES = (4.0, 3.0)


def draw_curves(
    path: Path,
    title: str,
    epochs: Sequence[Mapping[str, float]],
    best_epoch: int | None = None,
    measure: str = "NDCG@10",
) -> None:
    """Writes a PNG with a panel for each of PANELS that ``epochs`` know.

    epochs: objects with ``epoch`` and any of SCALARS, as ``TrainingLog`` keeps them. best_epoch is
    marked; measure: what the scores are. Raises ValueError where there is nothing to draw,
    ModuleNotFoundError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [name for name in PANELS if any(name in facts for facts in epochs)]
    if not panels:
        raise ValueError(f"{title}: there is no epoch to draw; train it first")
    figure = Figure(figsize=(PANEL_INCHES[0] * len(panels), PANEL_INCHES[1]), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        points = [(facts["epoch"], facts[name]) for facts in epochs if name in facts]
        alone = {"marker": "o"} if len(points) == 1 else {}
        axes.plot(*zip(*points, strict=True), color="#1f77b4", **alone)
        if best_epoch is not None:
            axes.axvline(best_epoch, color="#999999", linewidth=0.8, linestyle="--")
        axes.set_title(scalar_names(measure)[name], loc="left", fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, color="#dddddd", linewidth=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))
