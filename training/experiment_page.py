"""The page of the experiments: tables with mean and spread, a plot each, and whether the paper's claim held."""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medvl_sam2.engine.files import write_text
from medvl_sam2.training.experiment_plots import Arms, draw_arms, draw_classes, draw_curves, save
from medvl_sam2.training.summary import MODES, SMALL
from medvl_sam2.training.verdicts import HELD, OPEN, REVERSED, UNMEASURED, Comparison, compare, overall, spread

_NAMES = {
    "mixer": "MLP-Mixer (the paper's)",
    "grouped_linear": "linear, 4 neighbours joined",
    "pooled": "mean of 4 neighbours, then M3D-LaMed's MLP",
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
    "minutes": "training, minutes",
}
_ANSWERS = ("multiple_choice_accuracy", "short_accuracy", "findings_f1")
_TITLES = {
    "projector": "Projector: MLP-Mixer against linear projections",
    "prompts": "Prompts: which structures need a point or a box",
    "stages": "Stages: three against one",
}
_CLAIMS = {
    "projector": "The Mixer keeps spatial relations that a linear projection to the same number of tokens loses, so "
    "masks are better. Rivals: a linear layer on four neighbouring tokens joined, and an MLP on their mean. The claim "
    "rests on the Dice of structures from 20 mL on; small structures and answers are told apart.",
    "prompts": "[SEG] alone lacks the place of small structures, and a point or box supplies it. Up to twelve objects "
    "of a phantom are asked for in all five ways, and only these count.",
    "stages": "Training in three stages ends better than training everything at once, at the same optimiser settings "
    "and number of steps. All steps of the one-stage runs are joint ones: they see more requests for masks than the "
    "three stages do, and take longer. The claim rests on Dice and on multiple-choice answers.",
}
_INTRODUCTION = """The paper's claims (arXiv 2601.09879) at the scale of the `tiny` preset, on phantoms that no run has
seen. They say what holds for a small model on made scans after few steps, not what holds for the paper's model on
patients.

**Method.** All arms of an experiment begin with the same LLM, 3D ViT, SAM2 and [SEG] bridge; projector and LoRA begin
anew. They have the same number of steps, batch, learning rate and phantoms, and with equal seeds the same batches in
each stage. Each is run with {seeds} seeds and measured on the same unseen phantoms at their own resolution. Tables give
mean ± standard deviation over seeds. A comparison takes the differences of equal seeds: it *held* where the 95 %
interval of their mean (Student's t) lies above zero, *the reverse was seen* where it lies below; else there is *no
verdict*. So few seeds tell large differences only, and of many comparisons one in twenty errs. "Small structures" are
adrenal glands, pancreas, gallbladder, lung nodules and liver lesions.

**Cost.** Measured with the budget of `training/configs/experiment.yaml` and three seeds on two cores of an Intel Xeon
with AMX, two runs at a time and a core each: 600 phantoms to train on are rendered in 5 minutes and 16 to measure on in
3, once; a run of 40, 180 and 180 steps takes 8 to 10 minutes, one of 400 joint steps 13 to 16; measuring it 3, and in
all five ways of asking 12. So `projector`, nine runs, takes about an hour; `prompts` then measures its three Mixer runs
anew, in 25 minutes; `stages` takes them over and adds three one-stage runs, in 35. One that was killed goes on when the
command is given again, and this page is written anew after each seed."""
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_page(results: Path, page: Path) -> Path:
    """Write the page, and a plot beside it for each experiment with results; the others are said not to have been run.

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
    paths = {name: results / f"{name}.json" for name in sections}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    lines = ["# Experiments", "", _introduction(sorted({len(result["seeds"]) for result in found.values()}))]
    for name, section in sections.items():
        lines += ["", f"## {_TITLES[name]}", "", textwrap.fill(f"**Claim.** {_CLAIMS[name]}", 120), ""]
        command = f"medvl-sam2 experiment {name}"
        if name in found:
            result = found[name]
            command = result["command"] or command
            lines += [_budget(result), "", *section(result, page)]
        else:
            lines += ["Not run yet: there are no results."]
        lines += ["", f"Repeat: `{command}`"]
    write_text(page, "\n".join(lines) + "\n")
    return page


def _introduction(counts: list[int]) -> str:
    """What holds for all experiments, of which some have these numbers of seeds."""
    words = [_NUMBERS[count] if count < len(_NUMBERS) else str(count) for count in counts]
    text = _INTRODUCTION.format(seeds=" or ".join(words) or "several")
    return "\n\n".join(textwrap.fill(part, 120) for part in text.split("\n\n"))


def _values(rows: list[dict[str, Any]], key: str) -> list[float | None]:
    return [row.get(key) for row in rows]


def _table(arms: Arms, keys: dict[str, str]) -> list[str]:
    shown = {
        key: text for key, text in keys.items() if any(row.get(key) is not None for a in arms.values() for row in a)
    }
    lines = ["| | " + " | ".join(shown.values()) + " |", "|---|" + "---|" * len(shown)]
    for arm, rows in arms.items():
        cells = " | ".join(spread(_values(rows, key), 1 if key == "minutes" else 3) for key in shown)
        lines.append(f"| {_NAMES.get(arm, arm)} | {cells} |")
    return lines


def _budget(result: dict[str, Any]) -> str:
    return " ".join(filter(None, (_beginning(result), result.get("note"))))


def _beginning(result: dict[str, Any]) -> str:
    done = max(map(len, result["arms"].values()), default=0)
    said = f"{done} of {len(result['seeds'])} seeds" if done < len(result["seeds"]) else f"{done} seeds"
    said += f", {result['scans']} unseen phantoms each. "
    if result["model"]:
        return f"{said}Measured on `{result['model']}`, on a set of phantoms of its own for each seed."
    said += f"Steps: {', '.join(f'{stage} {count}' for stage, count in result['steps'].items())}. "
    base = result["base"]
    if base["name"] is None:
        return f"{said}The parts were pre-trained here."
    if base["before_stages"]:
        return f"{said}All begin with the pre-trained parts of `{base['name']}`, as they were before any stage."
    return (
        f"{said}All begin with the parts of `{base['name']}`, which has been through three stages behind a Mixer: what "
        "its ViT and SAM2 learnt there may favour a Mixer, and hides some of what the stages teach."
    )


def _verdict(comparisons: list[Comparison]) -> str:
    return f"**Verdict.** {overall(comparisons)}"


def _against(arms: Arms, first: str, second: str, key: str) -> Comparison:
    return compare(_values(arms[first], key), _values(arms[second], key))


def _projector(result: dict[str, Any], page: Path) -> list[str]:
    arms: Arms = result["arms"]
    told, basis = [], []
    for rival in ("grouped_linear", "pooled"):
        for key in ("dice_text", "small_dice_text", "multiple_choice_accuracy"):
            comparison = _against(arms, "mixer", rival, key)
            told.append(f"- Mixer better than {_NAMES[rival]}, {_MEASURES[key]}: {comparison.words()}.")
            basis += [comparison] if key == "dice_text" else []
    shown = {key: _MEASURES[key] for key in ("dice_text", "small_dice_text", "multiple_choice_accuracy")}
    plot = save(draw_arms(arms, shown), page, "projector")
    return [*_table(arms, _MEASURES), "", _verdict(basis), "", *told, "", f"![Dice and answers by projector]({plot})"]


def _prompts(result: dict[str, Any], page: Path) -> list[str]:
    rows = [row["prompts"] for row in result["arms"]["prompts"]]
    sizes = {size: {mode: _values([row[size] for row in rows], mode) for mode in MODES} for size in ("large", "small")}
    classes = {
        name.replace("_", " "): {
            mode: _values([row["classes"].get(name, {}) for row in rows], mode) for mode in (*MODES, "objects")
        }
        for name in sorted({name for row in rows for name in row["classes"]})
    }
    lines = ["| | " + " | ".join(_NAMES[mode] for mode in MODES) + " | objects |", "|---|" + "---|" * (len(MODES) + 1)]
    named = {"**20 mL and more**": sizes["large"], "**small structures**": sizes["small"], **classes}
    counts = [_values([row[size] for row in rows], "objects") for size in ("large", "small")]
    counts += [modes["objects"] for modes in classes.values()]
    for (name, modes), count in zip(named.items(), counts):
        cells = " | ".join(spread(modes[mode]) for mode in MODES)
        lines.append(f"| {name} | {cells} | {sum(filter(None, count))} |")
    told = []
    for size, modes in (("small structures", sizes["small"]), ("20 mL and more", sizes["large"])):
        for better, worse in (("point", "text"), ("box", "text"), ("box", "box_alone"), ("point", "point_alone")):
            words = compare(modes[better], modes[worse]).words()
            told.append(f"- {_NAMES[better]} better than {_NAMES[worse]}, {size}: {words}.")
    basis = [compare(sizes["small"][mode], sizes["small"]["text"]) for mode in ("point", "box")]
    plot = save(draw_classes(classes, _NAMES), page, "prompts")
    needs = [f"- {text}: {', '.join(names) or 'none'}." for text, names in _needs(classes).items()]
    return [*lines, "", _verdict(basis), "", *told, *needs, "", f"![Dice per class and way of asking]({plot})"]


def _needs(classes: dict[str, dict[str, list[float | None]]]) -> dict[str, list[str]]:
    """Classes by what a box adds to [SEG]; small ones are marked."""
    found: dict[str, list[str]] = {HELD: [], REVERSED: [], OPEN: [], UNMEASURED: []}
    for name, modes in classes.items():
        small = name in SMALL or name.replace(" ", "_") in SMALL
        found[compare(modes["box"], modes["text"]).outcome].append(f"{name} (small)" if small else name)
    return {
        "A box helps [SEG]": found[HELD],
        "A box harms [SEG]": found[REVERSED],
        "No verdict on a box": found[OPEN],
        "Seen with fewer than two seeds": found[UNMEASURED],
    }


def _stages(result: dict[str, Any], page: Path) -> list[str]:
    arms: Arms = result["arms"]
    told = []
    for key in ("dice_text", "small_dice_text", *_ANSWERS):
        comparison = _against(arms, "three stages", "one stage", key)
        told.append(f"- Three stages better than one, {_MEASURES[key]}: {comparison.words()}.")
    for key in _ANSWERS:
        words = _against(arms, "after stage 2", "three stages", key).words(
            "stage 3 forgot some of it", "stage 3 added to it", "no forgetting beyond the spread"
        )
        told.append(f"- What stage 2 knew, {_MEASURES[key]}: {words}.")
    basis = [_against(arms, "three stages", "one stage", key) for key in ("dice_text", "multiple_choice_accuracy")]
    plot = save(draw_curves(arms), page, "stages")
    return [*_table(arms, _MEASURES), "", _verdict(basis), "", *told, "", f"![Text loss in training]({plot})"]
