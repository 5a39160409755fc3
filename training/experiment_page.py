"""The page of the experiments: tables with mean and spread, a plot each, and whether the paper's claim held."""

import csv
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medvl_sam2.training.summary import SMALL

Arms = dict[str, list[dict[str, Any]]]
_NAMES = {
    "mixer": "MLP-Mixer (the paper's)",
    "grouped_linear": "linear, 4 neighbours joined",
    "pooled": "average of 4, then linear",
    "text": "[SEG] alone",
    "point": "[SEG] + point",
    "box": "[SEG] + box",
    "point_alone": "point alone",
    "box_alone": "box alone",
}
_MEASURES = {
    "dice_text": "Dice, 20 mL and more",
    "small_dice_text": "Dice, small structures",
    "surface_dice_text": "surface Dice",
    "multiple_choice_accuracy": "multiple choice",
    "short_accuracy": "short answers",
    "findings_f1": "findings F1",
}
_MODES = ("text", "point", "box", "point_alone", "box_alone")


def write_page(results: Path, page: Path) -> Path:
    """Write the page and a plot per experiment beside it, of all experiments with results.

    Args:
        results: Folder with `projector.json`, `prompts.json`, `stages.json`, as far as they have been run.
        page: Markdown file to write.

    Returns:
        The page.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Callable[[dict[str, Any], Path], list[str]]] = {
        "projector": _projector,
        "prompts": _prompts,
        "stages": _stages,
    }
    lines = [
        "# Experiments",
        "",
        "The paper's claims (arXiv 2601.09879) at the scale of the `tiny` preset, on phantoms that no run has seen. "
        "They say what holds for a small model on made scans, not what holds for the paper's model on patients. "
        "Numbers are mean ± standard deviation over seeds; a difference is taken for real where its mean over pairs of "
        "equal seed is no smaller than its standard deviation.",
    ]
    for name, section in sections.items():
        if (results / f"{name}.json").is_file():
            lines += ["", *section(json.loads((results / f"{name}.json").read_text()), page)]
    page.write_text("\n".join(lines) + "\n")
    return page


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation as text, a dash where nothing was measured."""
    held = [value for value in values if value is not None]
    if not held:
        return "-"
    deviation = statistics.stdev(held) if len(held) > 1 else 0.0
    return f"{statistics.mean(held):.3f} ± {deviation:.3f}"


def verdict(better: Sequence[float | None], worse: Sequence[float | None]) -> str:
    """Whether the first arm beat the second, seed by seed, in words.

    It held where the mean difference is positive and no smaller than the standard deviation of the differences; it was
    contradicted where it is as clearly negative.
    """
    pairs = [a - b for a, b in zip(better, worse) if a is not None and b is not None]
    if len(pairs) < 2:
        return "not measured"
    mean, deviation = statistics.mean(pairs), statistics.stdev(pairs)
    told = f"difference {mean:+.3f} ± {deviation:.3f}"
    if abs(mean) < deviation or mean == 0:
        return f"no difference beyond the spread ({told})"
    return f"held ({told})" if mean > 0 else f"did not hold, the reverse was seen ({told})"


def _values(rows: list[dict[str, Any]], key: str) -> list[float | None]:
    return [row.get(key) for row in rows]


def _table(arms: Arms, keys: dict[str, str]) -> list[str]:
    shown = {
        key: text for key, text in keys.items() if any(row.get(key) is not None for a in arms.values() for row in a)
    }
    lines = ["| | " + " | ".join(shown.values()) + " |", "|---|" + "---|" * len(shown)]
    for arm, rows in arms.items():
        cells = " | ".join(spread(_values(rows, key)) for key in shown)
        lines.append(f"| {_NAMES.get(arm, arm)} | {cells} |")
    return lines


def _budget(result: dict[str, Any]) -> str:
    steps = ", ".join(f"{name} {count}" for name, count in result["steps"].items() if count)
    return f"{len(result['seeds'])} seeds, {result['scans']} unseen phantoms each. Steps: {steps}."


def _projector(result: dict[str, Any], page: Path) -> list[str]:
    arms: Arms = result["arms"]
    claims = []
    for rival in ("grouped_linear", "pooled"):
        for key in ("dice_text", "small_dice_text", "multiple_choice_accuracy"):
            told = verdict(_values(arms["mixer"], key), _values(arms[rival], key))
            claims.append(f"- Mixer over {_NAMES[rival]}, {_MEASURES[key]}: {told}.")
    plot = _plot_arms(arms, ("dice_text", "small_dice_text", "multiple_choice_accuracy"), page, "projector")
    return [
        "## Projector: MLP-Mixer against linear projections",
        "",
        "Claim: the Mixer keeps spatial relations that a linear projection loses, at the same number of tokens. "
        f"{_budget(result)}",
        "",
        *_table(arms, _MEASURES),
        "",
        *claims,
        "",
        f"![Dice and answers by projector]({plot})",
        "",
        "Repeat: `medvl-sam2 experiment projector`",
    ]


def _prompts(result: dict[str, Any], page: Path) -> list[str]:
    runs = result["arms"]["prompts"]
    overall: Arms = {mode: [{"dice": row.get(f"dice_{mode}")} for row in runs] for mode in _MODES}
    classes = sorted({name for row in runs for name in row["dice_per_class"]})
    per_class = {
        name: {mode: [row["dice_per_class"].get(name, {}).get(mode) for row in runs] for mode in _MODES}
        for name in classes
    }
    lines = ["| | " + " | ".join(_NAMES[mode] for mode in _MODES) + " |", "|---|" + "---|" * len(_MODES)]
    needy = []
    for name, modes in per_class.items():
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(spread(modes[mode]) for mode in _MODES) + " |")
        if verdict(modes["box"], modes["text"]).startswith("held"):
            needy.append(name.replace("_", " "))
    small = [name for name in needy if name.replace(" ", "_") in SMALL or name in SMALL]
    plot = _plot_classes(per_class, page)
    return [
        "## Prompts: which structures need a point or a box",
        "",
        f"Claim: [SEG] lacks the place of small structures, and a spatial prompt supplies it. {_budget(result)}",
        *(["", f"Measured on {result['model']}, a set of scans per seed."] if result["model"] else []),
        "",
        *_table(overall, {"dice": "Dice, 20 mL and more"}),
        "",
        *lines,
        "",
        f"A box helps beyond the spread in {len(needy)} of {len(classes)} classes: {', '.join(needy) or 'none'}. "
        f"Of the small ones: {', '.join(small) or 'none'}.",
        "",
        f"![Dice per class and prompt]({plot})",
        "",
        "Repeat: `medvl-sam2 experiment prompts`",
    ]


def _stages(result: dict[str, Any], page: Path) -> list[str]:
    arms: Arms = result["arms"]
    claims = []
    for key in ("dice_text", "multiple_choice_accuracy", "short_accuracy", "findings_f1"):
        told = verdict(_values(arms["three stages"], key), _values(arms["one stage"], key))
        claims.append(f"- Three stages over one, {_MEASURES[key]}: {told}.")
    for key in ("multiple_choice_accuracy", "short_accuracy", "findings_f1"):
        told = verdict(_values(arms["three stages"], key), _values(arms["after stage 2"], key))
        claims.append(f"- Kept from stage 2 through stage 3, {_MEASURES[key]}: {told}.")
    plot = _plot_losses(arms, page)
    return [
        "## Stages: three against one",
        "",
        "Claim: training in three stages ends better than training everything at once, at the same optimiser settings "
        f"and number of steps. {_budget(result)}",
        "",
        *_table(arms, _MEASURES),
        "",
        *claims,
        "",
        f"![Training losses]({plot})",
        "",
        "Repeat: `medvl-sam2 experiment stages`",
    ]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _save(figure: Any, page: Path, name: str) -> str:
    folder = page.parent / "experiments"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=110)
    return f"experiments/{name}.png"


def _plot_arms(arms: Arms, keys: Sequence[str], page: Path, name: str) -> str:
    figure, axes = _figure(3.2 * len(keys), 3, len(keys))
    for axis, key in zip(axes, keys):
        for place, rows in enumerate(arms.values()):
            held = [value for value in _values(rows, key) if value is not None]
            if held:
                axis.plot([place] * len(held), held, "o", alpha=0.6)
                axis.plot([place - 0.2, place + 0.2], [statistics.mean(held)] * 2, "k-")
        axis.set_xticks(range(len(arms)), list(arms), rotation=20)
        axis.set_title(_MEASURES[key], fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    return _save(figure, page, name)


def _plot_classes(per_class: dict[str, dict[str, list[float | None]]], page: Path) -> str:
    figure, (axis,) = _figure(7.5, 1.5 + 0.24 * len(per_class))
    names = list(per_class)
    for mode, marker in zip(_MODES, "os^DP"):
        means = [(i, [v for v in per_class[name][mode] if v is not None]) for i, name in enumerate(names)]
        held = [(i, statistics.mean(values)) for i, values in means if values]
        axis.plot([value for _, value in held], [i for i, _ in held], marker, label=_NAMES[mode], alpha=0.8)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.set(xlim=(0, 1), xlabel="mean Dice")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    return _save(figure, page, "prompts")


def _plot_losses(arms: Arms, page: Path) -> str:
    figure, (axis,) = _figure(7, 3.5)
    for arm, colour in (("three stages", "tab:blue"), ("one stage", "tab:orange")):
        for number, row in enumerate(arms[arm]):
            done = 0
            for stage in ("stage1", "stage2", "stage3"):
                path = Path(row["run"]) / "logs" / f"{stage}.csv"
                if not path.is_file():
                    continue
                with open(path, newline="") as file:
                    points = [(int(r["step"]), float(r["ce"])) for r in csv.DictReader(file)]
                if points:
                    label = arm if number == 0 and done == 0 else None
                    axis.plot(
                        [done + s for s, _ in points], [ce for _, ce in points], color=colour, alpha=0.6, label=label
                    )
                    done += points[-1][0]
    axis.set(xlabel="step", ylabel="text loss", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    return _save(figure, page, "stages")
