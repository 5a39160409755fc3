"""A picture of a scan's masks: axial slices and one coronal view with overlays, and a legend."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from medvl_sam2.engine.case import Case, to_gray
from medvl_sam2.engine.files import replacing

PANEL, GAP, LEGEND = 300, 6, 330
GROUND, INK, FAINT = (14, 17, 22), (232, 236, 241), (150, 160, 172)
_FILL = 0.38


def write_montage(path: str | Path, cases: Sequence[Case]) -> None:
    """Write a PNG with one band per case.

    Raises:
        InputError: The place cannot be written.
    """
    bands = [_band(case) for case in cases]
    picture = Image.new("RGB", (max(b.width for b in bands), sum(b.height for b in bands)), GROUND)
    top = 0
    for band in bands:
        picture.paste(band, (0, top))
        top += band.height
    with replacing(path) as part:
        picture.save(part, format="PNG", optimize=True)


def overlay(gray: np.ndarray, masks: Sequence[np.ndarray], colors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Tint masks on a grey image, with an opaque outline.

    Args:
        gray: (H, W) uint8.
        masks: (H, W) bool each; later ones lie on top.
        colors: RGB of each.

    Returns:
        (H, W, 3) uint8.
    """
    image = np.repeat(gray[..., None], 3, axis=2).astype(np.float32)
    for mask, color in zip(masks, colors):
        if not mask.any():
            continue
        edge = mask & ~ndimage.binary_erosion(mask)
        image[mask] += _FILL * (np.array(color, np.float32) - image[mask])
        image[edge] = color
    return image.astype(np.uint8)


def _band(case: Case, axial: int = 3) -> Image.Image:
    shown = [(i, o) for i, o in enumerate(case.objects) if o.mask is not None]
    panels = [_axial(case, shown, z) for z in _telling_slices([o.mask for _, o in shown], case.volume.shape[0], axial)]
    panels.append(_coronal(case, shown))
    width = GAP + len(panels) * (PANEL + GAP) + LEGEND
    rows = max(len(case.objects), 1)
    band = Image.new("RGB", (width, max(PANEL, 60 + 36 * rows) + 40), GROUND)
    draw = ImageDraw.Draw(band)
    draw.text((GAP + 2, 8), case.title, INK, _font(17))
    for number, (panel, caption) in enumerate(panels):
        left = GAP + number * (PANEL + GAP)
        band.paste(panel, (left + (PANEL - panel.width) // 2, 34 + (PANEL - panel.height) // 2))
        draw.text((left + 6, 38), caption, INK, _font(12), stroke_width=2, stroke_fill=GROUND)
    _legend(draw, case, width - LEGEND + 4)
    return band


def _legend(draw: ImageDraw.ImageDraw, case: Case, left: int) -> None:
    for number, one in enumerate(case.objects):
        top = 38 + 36 * number
        if one.mask is not None:
            draw.rounded_rectangle((left, top + 3, left + 14, top + 17), 3, case.color(number))
        else:
            draw.rounded_rectangle((left, top + 3, left + 14, top + 17), 3, outline=FAINT)
        draw.text((left + 24, top), _fit(one.name, 300, 14), INK, _font(14))
        draw.text((left + 24, top + 17), f"by {one.how}: {one.outcome}", FAINT, _font(12))


def _axial(case: Case, shown: Sequence[tuple], z: int) -> tuple[Image.Image, str]:
    height, width = case.volume.spacing[1], case.volume.spacing[2]
    image = overlay(case.gray(z), [o.mask[z][case.shown] for _, o in shown], [case.color(i) for i, _ in shown])
    return _fitted(image, height, width), f"axial {z + 1}/{case.volume.shape[0]}"


def _coronal(case: Case, shown: Sequence[tuple]) -> tuple[Image.Image, str]:
    volume, columns = case.volume, case.shown[1]
    filled = sum((o.mask.sum((0, 2)) for _, o in shown), np.zeros(volume.shape[1], int))
    y = int(filled.argmax()) if filled.any() else volume.shape[1] // 2
    hu = volume.voxels[:, y, columns].astype(np.float32) * volume.slope + volume.intercept
    masks = [o.mask[:, y, columns] for _, o in shown]
    # Rows run from head to feet.
    image = overlay(to_gray(hu, case.window), masks, [case.color(i) for i, _ in shown])[::-1]
    return _fitted(image, volume.spacing[0], volume.spacing[2]), f"coronal {y + 1}/{volume.shape[1]}"


def _telling_slices(masks: Sequence[np.ndarray], depth: int, count: int) -> list[int]:
    """Slices that between them show every object near its largest section; evenly spaced ones without masks."""
    areas = np.array([mask.sum((1, 2)) for mask in masks if mask.any()], float).reshape(-1, depth)
    if not len(areas):
        return sorted({depth * (i + 1) // (count + 1) for i in range(count)})
    shares = areas / areas.max(1, keepdims=True)
    best, chosen = np.zeros(len(shares)), []
    for _ in range(min(count, depth)):
        gain = np.maximum(shares, best[:, None]).sum(0)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        best = np.maximum(best, shares[:, chosen[-1]])
    return sorted(chosen, reverse=True)


def _fitted(image: np.ndarray, row_mm: float, column_mm: float) -> Image.Image:
    height, width = image.shape[0] * row_mm, image.shape[1] * column_mm
    scale = PANEL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)


def _fit(text: str, width: int, size: int) -> str:
    font = _font(size)
    while font.getlength(text) > width and len(text) > 4:
        text = text[:-4].rstrip() + "..."
    return text


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)
