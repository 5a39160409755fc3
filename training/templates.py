"""Prompts and answers in our own words for the real data sets: report, VQA, semantic, referring, interactive, negative.

A template with ``{}`` takes a class name or a description. Phantoms use a few of these only, so that a small model can
learn them; M3D-Cap, M3D-Seg, M3D-RefSeg, CT-RATE and TotalSegmentator records draw from all.
"""

from __future__ import annotations

import numpy as np

from medvl_sam2.model.prompts import REPORT_REQUEST, SEGMENT_ANSWER

REPORT_PROMPTS: tuple[str, ...] = (
    REPORT_REQUEST,
    "Report this scan.",
    "Write a radiology report.",
    "What does this scan show?",
)
"""The few report prompts of the phantoms; the first is the engine's own."""

REPORT_TEMPLATES: tuple[str, ...] = (
    *REPORT_PROMPTS,
    "Please write the findings of this CT volume.",
    "Dictate a report for the CT shown.",
    "Give a radiologist's account of this volume.",
    "Draft the findings and the impression for this study.",
    "Go through this scan and report what you see.",
    "Summarise the findings of this examination.",
    "Read this scan and write down what matters.",
    "Could you report this examination?",
    "Which findings does this volume hold? Answer as a report.",
    "Please prepare a structured report of this CT.",
    "Describe the images as for a referring physician.",
    "State the normal and the abnormal findings of this scan.",
    "Produce the text of the report that belongs to this CT.",
    "Look at the whole volume and write its report.",
    "What would a radiologist write about this study?",
    "Please put the findings of this scan into words.",
    "Compose a report with findings and impression.",
    "Describe this 3D image in the style of a report.",
    "Turn this CT into a written report.",
    "Provide a full description of this examination.",
)

SHORT_TEMPLATES: tuple[str, ...] = (
    "{}",
    "{} Answer briefly.",
    "{} Answer in a few words.",
    "Short answer, please: {}",
    "{} A word or two will do.",
    "In brief: {}",
)
LONG_TEMPLATES: tuple[str, ...] = (
    "{}",
    "{} Answer in full sentences.",
    "{} Please explain.",
    "Answer at length: {}",
    "{} Give the details.",
    "Please discuss: {}",
)
CHOICE_TEMPLATES: tuple[str, ...] = (
    "{}",
    "{} Pick one choice.",
    "{} Answer with one of the choices.",
    "Choose the right answer. {}",
    "Only one of these is right. {}",
    "{} Which choice fits?",
)
"""Around a question, and around a question with its lettered choices."""

SEMANTIC_TEMPLATES: tuple[str, ...] = (
    "Segment the {}.",
    "Please segment the {}.",
    "Show the {}.",
    "Where is the {}?",
    "Outline the {} in this scan.",
    "Give the mask of the {}.",
    "Can you segment the {} here?",
    "Mark every voxel of the {}.",
    "Delineate the {}, please.",
    "I need a segmentation of the {}.",
    "Find the {} and return its mask.",
    "Draw the contour of the {}.",
    "Which voxels belong to the {}?",
    "Label the {} in this volume.",
    "Locate the {} and segment it.",
    "Please provide a mask for the {}.",
    "Could you highlight the {}?",
    "Extract the {} from the volume.",
    "Produce the segmentation of the {}.",
    "Separate the {} from the rest.",
)

REFERRING_TEMPLATES: tuple[str, ...] = (
    "Segment the {}.",
    "Show the {}.",
    "Which structure is meant by this: {}? Segment it.",
    "Segment what is described here: {}.",
    "Description: {}. Find it and give its mask.",
    "Please mark the part of the scan that fits: {}.",
    "Look for the following and outline it: {}.",
    "I am thinking of this: {}. Name it and segment it.",
    "Segment the region that matches the text: {}.",
    "Read the description and return the mask. {}",
    "Where in this volume is this: {}?",
    "Can you delineate the thing described as: {}?",
    "Name and segment: {}.",
    "The target is described as follows: {}. Please segment.",
    "Outline whatever answers to: {}.",
)

INTERACTIVE_TEMPLATES: tuple[str, ...] = (
    "Segment the structure at the given prompt.",
    "Segment what I have marked.",
    "Outline the object under the prompt.",
    "Give the mask for the marked place.",
    "Please segment the object at this point.",
    "What is inside the box? Segment it.",
    "Segment the {}; I have marked it.",
    "The {} is marked. Return its mask.",
    "Use my mark to segment the {}.",
    "Refine the {} with the given prompt.",
)
"""The mark itself goes to the mask decoder only, never into the text. Those without ``{}`` name no class."""

SEG_ANSWERS: tuple[str, ...] = (
    SEGMENT_ANSWER,
    "Here it is: [SEG].",
    "The mask is [SEG].",
    "Sure, it is [SEG].",
    "Segmented: [SEG].",
    "The segmentation is [SEG].",
    "Certainly: [SEG].",
    "You find it at [SEG].",
    "The answer is [SEG].",
    "This is the mask: [SEG].",
)
REFERRING_ANSWERS: tuple[str, ...] = (
    "It is the {}: [SEG].",
    "That is the {}, [SEG].",
    "The {} fits: [SEG].",
    "This describes the {}: [SEG].",
    "The {} is meant, [SEG].",
    "You mean the {}: [SEG].",
)
NEGATIVE_ANSWERS: tuple[str, ...] = (
    "There is no {} in this scan.",
    "There is no {} to segment.",
    "There is no {} here.",
    "There is no {} within this volume.",
    "There is no {}, so there is no mask.",
    "There is no sign of a {} in this scan.",
)
"""All begin alike, so that present or absent is decided at the first token of the answer."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "report": REPORT_TEMPLATES,
    "short": SHORT_TEMPLATES,
    "long": LONG_TEMPLATES,
    "multiple_choice": CHOICE_TEMPLATES,
    "semantic": SEMANTIC_TEMPLATES,
    "referring": REFERRING_TEMPLATES,
    "interactive": INTERACTIVE_TEMPLATES,
    "seg_answer": SEG_ANSWERS,
    "referring_answer": REFERRING_ANSWERS,
    "negative_answer": NEGATIVE_ANSWERS,
}


def fill(kind: str, rng: np.random.Generator, name: str = "") -> str:
    """Draw one template of a kind and put the name in.

    Args:
        kind: A key of `TEMPLATES`.
        rng: Chooses the template; one that needs a name is never chosen without one.
        name: Class name or description, without article or final full stop; for VQA the question.

    Raises:
        ValueError: If the kind is unknown, or every template of it needs a name and none is given.
    """
    if kind not in TEMPLATES:
        raise ValueError(f"kind: expected one of {sorted(TEMPLATES)}, got {kind!r}")
    fitting = [text for text in TEMPLATES[kind] if name or "{}" not in text]
    if not fitting:
        raise ValueError(f"name: expected a class name, description or question for {kind!r} templates, got none")
    return fitting[int(rng.integers(len(fitting)))].replace("{}", name)
