"""Charts of the benchmarks as PNG: where the time of a request goes, and how it grows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medvl_sam2.bench.kernels import Row

_TIME, _FLOOR, _BASE = "tab:blue", "0.25", "tab:orange"


def waterfall(stages: Sequence[Row], path: Path) -> Path:
    """Stages of a request one after the other, each with the floor it stands on.

    Args:
        stages: With the keys work, objects, stage, seconds, floor_seconds; one group per number of objects.
        path: Of the PNG.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in stages:
        groups.setdefault((row["work"], row["objects"]), []).append(row)
    figure, axes = _figure(8, [0.7 + 0.3 * len(rows) for rows in groups.values()])
    for axis, ((work, objects), rows) in zip(axes, groups.items()):
        start = 0.0
        for place, row in enumerate(rows):
            axis.barh(place, row["seconds"], left=start, color=_TIME, label=None if place else "measured")
            if row["floor_seconds"]:
                axis.barh(place, row["floor_seconds"], left=start, height=0.3, color=_FLOOR)
            start += row["seconds"]
            axis.text(start, place, f" {row['seconds']:.3f}", va="center", fontsize=8)
        axis.barh(0, 0, color=_FLOOR, label="floor")
        axis.set_yticks(range(len(rows)), [row["stage"] for row in rows])
        axis.invert_yaxis()
        axis.set(xlabel="seconds", xlim=(0, 1.12 * start))
        axis.set_title(f"{work}, {_objects(objects)}, new scan", fontsize=9)
        axis.legend(fontsize=8)
    return _save(figure, path)


def compared(rows: Sequence[Row], path: Path) -> Path:
    """Seconds of each side of each work, beside its floor.

    Args:
        rows: Of `medvl_sam2.bench.rows.judged`.
        path: Of the PNG.
    """
    works: dict[str, list[Row]] = {}
    for row in rows:
        objects = f", {_objects(row['objects'])}" if row["objects"] else ""
        works.setdefault(row["work"] + objects, []).append(row)
    return _raced(works, path, "seconds", "seconds (line: floor)", "ratio", "x", "floor_seconds")


def memory(rows: Sequence[Row], path: Path) -> Path:
    """Peak memory of each side at each size, with ours as a share of the package's.

    Args:
        rows: Of `medvl_sam2.bench.memory.run`.
        path: Of the PNG.
    """
    sizes: dict[str, list[Row]] = {}
    for row in rows:
        sizes.setdefault(f"{row['work']}, {row['slices']} slices, {_objects(row['objects'])}", []).append(row)
    return _raced(sizes, path, "peak_mb", "MB (number: share of the first)", "share")


def operations(rows: Sequence[Row], path: Path) -> Path:
    """Milliseconds of every provider of every operation, with its ratio to the plain chain.

    Args:
        rows: Of `medvl_sam2.bench.kernels.run`.
        path: Of the PNG.
    """
    cases: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row['operation']}: {row['shape']}, {row['mode']}, {row['dtype']}"
        cases.setdefault(title, []).append(row)
    return _raced(cases, path, "p50_ms", "ms (line: floor)", "ratio_to_eager", "x", "floor_ms")


def scaling(points: Sequence[Row], fits: Sequence[Row], path: Path) -> Path:
    """Time against slices, objects, resolution and batch, with the fitted line.

    Args:
        points: With the keys axis, x, seconds.
        fits: With the keys axis, slope, intercept, r2, exponent.
        path: Of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(fits), 3), layout="constrained")
    for axis, fit in zip(figure.subplots(1, len(fits), squeeze=False)[0], fits):
        x = [row["x"] for row in points if row["axis"] == fit["axis"]]
        axis.plot(x, [row["seconds"] for row in points if row["axis"] == fit["axis"]], "o", color=_TIME)
        ends = [min(x), max(x)]
        axis.plot(ends, [fit["intercept"] + fit["slope"] * end for end in ends], color=_FLOOR)
        axis.set(xlabel=fit["axis"], ylabel="seconds")
        axis.set_ylim(bottom=0)
        axis.set_title(f"R² {fit['r2']:.3f}, exponent {fit['exponent']:.2f}", fontsize=9)
    return _save(figure, path)


def _objects(count: int) -> str:
    return f"{count} object{'s' if count > 1 else ''}"


def _raced(
    groups: Mapping[str, Sequence[Row]],
    path: Path,
    value: str,
    label: str,
    note: str,
    unit: str = "",
    floor: str | None = None,
) -> Path:
    """A bar of each side of each group, the baseline first, with a number behind it and the floor as a line.

    Args:
        groups: Rows by title.
        path: Of the PNG.
        value, note, floor: Columns of the bar, of the number and of the floor.
        label: Of the axis.
        unit: Behind the number.
    """
    figure, axes = _figure(8, [0.8 + 0.3 * len(sides) for sides in groups.values()])
    for axis, (title, sides) in zip(axes, groups.items()):
        for place, row in enumerate(sides):
            axis.barh(place, row[value], color=_TIME if place else _BASE)
            told = " wrong" if row[note] is None else f" {row[note]:.2f}{unit}"
            axis.text(row[value], place, told, va="center", fontsize=8)
            if floor and row.get(floor):
                axis.plot([row[floor]] * 2, [place - 0.4, place + 0.4], color=_FLOOR)
        axis.set_yticks(range(len(sides)), [row["provider"] for row in sides])
        axis.invert_yaxis()
        axis.set(xlabel=label, xlim=(0, 1.15 * max(row[value] for row in sides)))
        axis.set_title(title, fontsize=9)
    return _save(figure, path)


def _figure(width: float, heights: list[float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights) + 0.4 * len(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    return figure, list(axes[:, 0])


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
