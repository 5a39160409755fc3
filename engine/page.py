"""One self-contained HTML page: slices to scroll through, masks to switch on and off, report and answers beside."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medvl_sam2.engine.case import Case
from medvl_sam2.engine.files import write_text

TEMPLATE = Path(__file__).with_name("assets") / "page.html"
MAX_SIDE, MAX_SLICES, MAX_OBJECTS = 384, 72, 24


def write_page(path: str | Path, title: str, cases: Sequence[Case], notes: Sequence[str] = ()) -> None:
    """Write the page.

    Args:
        path: .html file.
        title: Heading.
        cases: Scans, each with at most `MAX_OBJECTS` objects.
        notes: Lines for the foot of the page.

    Raises:
        InputError: The place cannot be written.
        ValueError: Too many objects.
    """
    data = {"cases": [_case(case) for case in cases], "notes": list(notes)}
    # A "</script>" inside a string would end the script it stands in.
    text = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", html.escape(title)).replace("{{data}}", text)
    write_text(path, page)


def _case(case: Case) -> dict[str, Any]:
    if len(case.objects) > MAX_OBJECTS:
        raise ValueError(f"objects: expected at most {MAX_OBJECTS} on a page, got {len(case.objects)}; show fewer")
    depth = case.volume.shape[0]
    height, width = case.gray(0).shape
    step = max(1, -(-max(height, width) // MAX_SIDE))
    chosen = np.unique(np.linspace(0, depth - 1, min(depth, MAX_SLICES)).round().astype(int))
    row, column = case.volume.spacing[1:]
    return {
        **case.to_dict(),
        "objects": [
            {**shown.to_dict(), "outcome": shown.outcome, "color": case.color(i)}
            for i, shown in enumerate(case.objects)
        ],
        "aspect": (width * column) / (height * row),
        "start": _best(case, chosen),
        "slices": [
            {"z": int(z), "image": _jpeg(case.gray(z), step), "bits": _bits(case, int(z), step)} for z in chosen
        ],
    }


def _best(case: Case, chosen: np.ndarray) -> int:
    """Index of the slice that shows most objects."""
    seen = sum((shown.mask[chosen].any((1, 2)).astype(int) for shown in case.objects if shown.mask is not None), 0)
    return int(np.argmax(seen)) if np.ndim(seen) else len(chosen) // 2


def _jpeg(gray: np.ndarray, step: int) -> str:
    image = Image.fromarray(gray)
    stream = io.BytesIO()
    image.resize((-(-image.width // step), -(-image.height // step)), Image.Resampling.BOX).save(
        stream, format="JPEG", quality=82
    )
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _bits(case: Case, z: int, step: int) -> str | None:
    """PNG whose 24 colour bits are the masks, bit n for object n, so that masks may overlap."""
    masked = [(number, shown) for number, shown in enumerate(case.objects) if shown.mask is not None]
    bits = sum((shown.mask[z][case.shown][::step, ::step].astype(np.uint32) << n for n, shown in masked), np.uint32(0))
    if not np.any(bits):
        return None
    stream = io.BytesIO()
    rgb = np.stack([bits & 255, bits >> 8 & 255, bits >> 16 & 255], axis=-1).astype(np.uint8)
    Image.fromarray(rgb).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
