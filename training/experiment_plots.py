"""The plots of the experiments' page."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from medvl_sam2.engine.files import replacing
from medvl_sam2.training.summary import MODES

Arms = dict[str, list[dict[str, Any]]]


def draw_arms(arms: Arms, measures: dict[str, str]) -> Figure:
    """A dot per seed and a bar at the mean, a panel per measure (key -> title)."""
    figure = Figure(figsize=(3.2 * len(measures), 3), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures.items()):
        for place, rows in enumerate(arms.values()):
            held = [row[key] for row in rows if row.get(key) is not None]
            if held:
                axis.plot([place] * len(held), held, "o", alpha=0.6)
                axis.plot([place - 0.2, place + 0.2], [statistics.mean(held)] * 2, "k-")
        axis.set_xticks(range(len(arms)), [arm.replace("_", " ") for arm in arms], rotation=20)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    return figure


def draw_classes(classes: dict[str, dict[str, list[float | None]]], names: dict[str, str]) -> Figure:
    """Mean Dice of each class by each way of asking.

    Args:
        classes: Class -> mode -> values by seed.
        names: Mode -> what the legend calls it.
    """
    figure = Figure(figsize=(7.5, 1.5 + 0.24 * len(classes)), layout="constrained")
    axis = figure.subplots()
    for mode, marker in zip(MODES, "osD^P"):
        values = [[value for value in modes.get(mode, ()) if value is not None] for modes in classes.values()]
        held = [(statistics.mean(found), place) for place, found in enumerate(values) if found]
        axis.plot([x for x, _ in held], [y for _, y in held], marker, label=names[mode], alpha=0.8)
    axis.set_yticks(range(len(classes)), list(classes))
    axis.set(xlim=(0, 1), ylim=(-0.7, len(classes) - 0.3), xlabel="mean Dice")
    axis.grid(alpha=0.3)
    # Above the axes: within them it would hide points.
    figure.legend(loc="outside upper center", ncols=len(MODES), fontsize=8)
    return figure


def draw_curves(arms: Arms) -> Figure:
    """Text loss of every run that trained, a colour per arm."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    trained = {arm: rows for arm, rows in arms.items() if all(row.get("curve") for row in rows)}
    for colour, (arm, rows) in enumerate(trained.items()):
        for number, row in enumerate(rows):
            steps, losses = zip(*row["curve"])
            axis.plot(steps, losses, color=f"C{colour}", alpha=0.6, label=arm if number == 0 else None)
    axis.set(xlabel="step", ylabel="text loss", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def save(figure: Figure, page: Path, name: str) -> str:
    """Write a plot into the folder `experiments` beside the page; returns its path relative to the page."""
    folder = page.parent / "experiments"
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"{name}.png") as part:
        figure.savefig(part, dpi=110)
    return f"experiments/{name}.png"
