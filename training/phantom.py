"""A procedural torso CT: anatomy, findings and facts drawn from a seed, rendered in HU on any grid.

World frame of `Phantom.render`: millimetres, x grows to the patient's left, y to the back, z to the head, so arrays
``(Z, Y, X)`` look like a radiologist's display. Everything follows from the seed: the same phantom in any process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np

from medvl_sam2.training.anatomy import PHASES, Body, draw_body
from medvl_sam2.training.phantom_findings import (
    ABSENT,
    FINDINGS,
    Finding,
    ascites_shapes,
    draw_types,
    place_findings,
    recoil_shape,
)
from medvl_sam2.training.phantom_layers import Painter
from medvl_sam2.training.phantom_organs import draw_organs, lung
from medvl_sam2.training.phantom_render import add_noise, paint

STRUCTURES: dict[str, int] = {
    name: k + 1
    for k, name in enumerate(
        (
            "left lung", "right lung", "heart", "aorta", "inferior vena cava", "trachea", "esophagus", "liver",
            "gallbladder", "spleen", "pancreas", "stomach", "left kidney", "right kidney", "left adrenal gland",
            "right adrenal gland", "urinary bladder", "colon", "vertebrae", "left ribs", "right ribs", "sternum",
            "left hip bone", "right hip bone", "sacrum", "left femur", "right femur",
        )
    )
}  # fmt: skip
REGIONS = ("thorax", "abdomen", "abdomen and pelvis", "thorax and abdomen", "thorax, abdomen and pelvis")
EVALUATION_SEED_START = 1_000_000
_REGION_SHARE = (0.28, 0.2, 0.24, 0.22, 0.06)
_FACTS_STEP_MM = 5.0


def check_training_seed(seed: int) -> int:
    """Return `seed`, or raise ValueError when it belongs to the evaluation (>= `EVALUATION_SEED_START`)."""
    if not 0 <= seed < EVALUATION_SEED_START:
        raise ValueError(
            f"seed: expected 0 to {EVALUATION_SEED_START - 1} for training, got {seed}; larger seeds are for evaluation"
        )
    return seed


@dataclass(frozen=True)
class NativePhantom:
    """A phantom as a scanner would deliver it.

    Attributes:
        voxels: int16 HU (Z, Y, X) of the written file: the file's axes (i, j, k) are (x, y, z) of the arrays.
        affine: 4x4, index (i, j, k) = (x, y, z) to RAS millimetres.
        structures, findings: uint8 (Z, Y, X).
    """

    voxels: np.ndarray
    affine: np.ndarray
    structures: np.ndarray
    findings: np.ndarray


class Phantom:
    """One drawn patient and scan; build it with `make_phantom`.

    Attributes:
        seed, region: as drawn.
        body: the patient's measures.
        box_mm: (3, 2) field of view in world mm: lowest and highest z, y, x.
        noise_sd: noise in HU of a 1 mm slice with 0.8 mm pixels.
    """

    def __init__(
        self, seed: int, region: str, body: Body, found: list[Finding], plan: dict, box_mm: np.ndarray
    ) -> None:
        self.seed, self.region, self.body = seed, region, body
        self.box_mm = box_mm
        self.noise_sd: float = plan["noise"]
        self._found, self._plan = found, plan

    @property
    def phase(self) -> str:
        """Contrast phase."""
        return self.body.phase

    @cached_property
    def _painter(self) -> Painter:
        return Painter(self.body, self._found, self._plan, STRUCTURES)

    def render(
        self,
        z_mm: np.ndarray,
        y_mm: np.ndarray,
        x_mm: np.ndarray,
        *,
        noise: bool = True,
        slice_thickness_mm: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Render on the grid of three world axes.

        Args:
            z_mm, y_mm, x_mm: monotonic world coordinates of the voxel centres.
            noise: add the scanner's noise.
            slice_thickness_mm: partial volume along z; by default the distance of the slices.

        Returns:
            (HU int16, structures uint8, findings uint8), each (Z, Y, X).
        """
        hu, structures, findings = self._render(z_mm, y_mm, x_mm, noise, slice_thickness_mm, True)
        return np.clip(np.rint(hu), -1024, 3071).astype(np.int16), structures, findings

    def _render(self, z_mm, y_mm, x_mm, noise, slice_thickness_mm, with_hu):
        axes = [np.atleast_1d(np.asarray(a, np.float64)) for a in (x_mm, y_mm, z_mm)]
        for name, axis in zip("xyz", axes, strict=True):
            steps = np.diff(axis)
            if axis.size == 0 or not (np.all(steps > 0) or np.all(steps < 0)):
                raise ValueError(f"{name}_mm: expected one or more strictly monotonic coordinates; sort the axis")
        flips = [-1 if axis.size > 1 and axis[1] < axis[0] else 1 for axis in axes]
        axes = [axis[::flip] for axis, flip in zip(axes, flips, strict=True)]
        pixel = float(np.median(np.diff(axes[0]))) if axes[0].size > 1 else 1.0
        if slice_thickness_mm is None:
            slice_thickness_mm = float(np.median(np.diff(axes[2]))) if axes[2].size > 1 else pixel
        soft = max(0.8 * pixel + 0.2 * slice_thickness_mm, 0.6)
        scale = self.body.scale
        grid = self.body.warped(*(axis / s for axis, s in zip(axes, scale, strict=True)), soft)
        shape = grid.x.shape
        structures, findings = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
        hu = None
        painter = self._painter
        if with_hu:
            hu = np.full(shape, -1000, np.float32)
            painter.add_textures(grid)
        paint(painter.parts, grid, hu, structures, findings)
        if hu is not None and noise:
            thin = (1.0 / max(slice_thickness_mm, 0.5)) ** 0.5
            add_noise(hu, self.seed, axes[2], self.noise_sd * (0.45 + thin) * min(1.0, (0.8 / pixel) ** 0.5), pixel < 2)
        order = (slice(None, None, flips[2]), slice(None, None, flips[1]), slice(None, None, flips[0]))
        return (hu[order] if hu is not None else None), structures[order], findings[order]

    @cached_property
    def facts(self) -> dict:
        """What the field of view shows, JSON-able.

        Keys: seed, region, phase, sex; structures (name to volume_ml and fraction inside the field of view, listed
        from 1 mL and 15 % on); removed (organ names); findings (type, side, organ, location, size_mm, volume_ml, with
        None for what does not apply).
        """
        whole = np.array([[-265, 450], [-175, 140], [-175, 175]]) * self.body.scale[::-1, None]
        low, high = self.box_mm[:, 0], self.box_mm[:, 1]
        steps = (high - low) / np.round((high - low) / _FACTS_STEP_MM)
        axes = []
        for k, step in enumerate(steps):
            start = low[k] - max(0.0, np.ceil((low[k] - whole[k, 0]) / step)) * step
            axes.append(np.arange(start + step / 2, max(whole[k, 1], high[k]), step))
        _, structures, findings = self._render(*axes, False, None, False)
        inside = tuple(slice(*np.searchsorted(axes[k], (low[k], high[k]))) for k in range(3))
        voxel_ml = float(np.prod(steps)) / 1000
        all_counts = np.bincount(structures.ravel(), minlength=len(STRUCTURES) + 1) * voxel_ml
        counts = np.bincount(structures[inside].ravel(), minlength=len(STRUCTURES) + 1) * voxel_ml
        present = {}
        for name, label in STRUCTURES.items():
            part = counts[label] / max(all_counts[label], 1e-9)
            if counts[label] >= 1.0 and part >= 0.15:
                present[name] = {"volume_ml": round(float(counts[label]), 1), "fraction": round(float(part), 3)}
        finding_map, structure_map = findings[inside], structures[inside]
        place = [axes[k][inside[k]] for k in range(3)]
        listed = [self._describe(f, finding_map, structure_map, place, voxel_ml) for f in self._found]
        return {
            "seed": self.seed,
            "region": self.region,
            "phase": self.phase,
            "sex": self.body.sex,
            "structures": present,
            "removed": list(self._plan["removed list"]),
            "findings": [f for f in listed if f is not None],
        }

    def _describe(
        self, f: Finding, findings: np.ndarray, structures: np.ndarray, axes: list[np.ndarray], voxel_ml: float
    ) -> dict | None:
        """The finding as listed in the facts, or None when the field of view does not show it."""
        x = axes[2]
        volume = f.volume_ml
        if f.type in ("pleural_effusion", "pneumothorax", "consolidation"):
            side = x > 0 if f.side == "left" else x < 0
            volume = float(np.count_nonzero(findings[:, :, side] == FINDINGS[f.type])) * voxel_ml
        elif f.type in ("ascites", "aortic_aneurysm"):
            volume = float(np.count_nonzero(findings == FINDINGS[f.type])) * voxel_ml
        elif f.type in ("hepatomegaly", "splenomegaly", "cardiomegaly"):
            volume = float(np.count_nonzero(structures == STRUCTURES[f.organ])) * voxel_ml
        elif f.shape is not None:
            center = (np.array(f.shape.center) * self.body.scale)[::-1]
            if not all(axis[0] - 2 <= c <= axis[-1] + 2 for axis, c in zip(axes, center, strict=True)):
                return None
            if volume > 4:
                volume = float(np.count_nonzero(findings == FINDINGS[f.type])) * voxel_ml
        if volume is not None and volume < (0.1 if f.size_mm else 20.0):
            return None
        return {
            "type": f.type,
            "side": f.side,
            "organ": f.organ,
            "location": f.location,
            "size_mm": None if f.size_mm is None else round(float(f.size_mm), 1),
            "volume_ml": None if volume is None else round(float(volume), 1),
        }

    def native(self, max_matrix: int = 512, slab: int = 8) -> NativePhantom:
        """Render at a clinical geometry drawn from the seed: matrix, slice spacing and the orientation of the axes.

        Args:
            max_matrix: upper limit of rows and columns; pixels grow to keep the field of view.
            slab: slices rendered at a time; more take more memory.
        """
        rng = np.random.default_rng((self.seed, 17))
        (z0, z1), (y0, y1), (x0, x1) = self.box_mm
        pixel = max((x1 - x0) / max_matrix, rng.uniform(0.6, 0.95))
        spacing = float(rng.choice([1.0, 1.5, 2.0, 2.5, 3.0, 5.0], p=[0.08, 0.12, 0.2, 0.2, 0.2, 0.2]))
        spacing = max(spacing, float(np.ceil((z1 - z0) / 130) / 2))
        x = np.arange(x0 + pixel / 2, x1, pixel)[:max_matrix]
        y = np.arange(y0 + pixel / 2, y1, pixel)[:max_matrix]
        z = np.arange(z0 + spacing / 2, z1, spacing)
        shape = (len(z), len(y), len(x))
        voxels = np.empty(shape, np.int16)
        structures, findings = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
        for start in range(0, len(z), slab):
            part = slice(start, start + slab)
            voxels[part], structures[part], findings[part] = self.render(z[part], y, x, slice_thickness_mm=spacing)
        flip = np.where(rng.random(3) < (0.35, 0.35, 0.25), -1, 1)
        order = tuple(slice(None, None, int(f)) for f in flip[::-1])
        affine = np.eye(4)
        for k, (axis, sign) in enumerate(((x, -1), (y, -1), (z, 1))):
            axis = axis[:: flip[k]]
            affine[k, k] = sign * (axis[1] - axis[0])
            affine[k, 3] = sign * axis[0]
        return NativePhantom(voxels[order], affine, structures[order], findings[order])


def make_phantom(seed: int, **overrides: object) -> Phantom:
    """Draw a phantom.

    Args:
        seed: decides everything; from `EVALUATION_SEED_START` on, seeds are for evaluation only.
        **overrides: `region`, `phase`, `sex`, or `findings` (a list of types) instead of the drawn ones.

    Raises:
        ValueError: an override is unknown or has an unknown value.
    """
    allowed = {"region": REGIONS, "phase": PHASES, "sex": ("female", "male"), "findings": None}
    for name, value in overrides.items():
        if name not in allowed:
            raise ValueError(f"overrides: expected some of {sorted(allowed)}, got {name!r}")
        choices = allowed[name]
        wrong = set(value) - set(FINDINGS) if choices is None else {value} - set(choices)
        if wrong:
            raise ValueError(f"{name}: expected one of {list(choices or FINDINGS)}, got {sorted(wrong)}")
    rng = np.random.default_rng((seed, 3))
    region = str(rng.choice(REGIONS, p=_REGION_SHARE))
    phase = str(rng.choice(PHASES, p=(0.36, 0.2, 0.44)))
    sex = str(rng.choice(("female", "male")))
    region, phase, sex = overrides.get("region", region), overrides.get("phase", phase), overrides.get("sex", sex)
    types = draw_types(rng, region)
    types = list(overrides.get("findings", types))
    body = draw_body(seed, rng, sex, phase)
    plan = _plan(rng, types)
    draw_organs(body, rng, plan["targets"], plan["gap"])
    fluid = {}
    for kind in ("pleural_effusion", "pneumothorax"):
        if kind in types and plan["sides"][kind] not in fluid:
            fluid[plan["sides"][kind]] = (kind, plan["amount"][kind])
    for word, side in (("left", 1), ("right", -1)):
        pleura, box = lung(body, side)
        body.extra[f"{word} lung pleura"] = (pleura, box)
        body.organs[f"{word} lung"] = lung(body, side, recoil_shape(*fluid[word])) if word in fluid else (pleura, box)
    found = place_findings(body, rng, types, plan, region)
    for f in found:
        if f.type == "pleural_effusion":
            f.hu = rng.normal(9, 4)
        elif f.type == "pneumothorax":
            f.hu = -990.0
        elif f.type == "ascites":
            f.hu = rng.normal(8, 4)
            f.extra.update(ascites_shapes(plan["gap"]))
    box = _field_of_view(rng, body, region)
    return Phantom(seed, region, body, found, plan, box)


def _plan(rng: np.random.Generator, types: list[str]) -> dict:
    sides = {kind: str(rng.choice(("left", "right"))) for kind in FINDINGS}
    if sides["pneumothorax"] == sides["pleural_effusion"]:
        sides["pneumothorax"] = "left" if sides["pleural_effusion"] == "right" else "right"
    if sides["lung_nodule"] == sides["consolidation"]:
        sides["lung_nodule"] = "left" if sides["consolidation"] == "right" else "right"
    if sides["kidney_stone"] == sides["renal_cyst"]:
        sides["kidney_stone"] = "left" if sides["renal_cyst"] == "right" else "right"
    removed = str(rng.choice(ABSENT, p=(0.4, 0.2, 0.2, 0.2)))
    if "splenomegaly" in types and removed == "spleen":
        removed = "gallbladder"
    if "kidney" in removed:
        other = "right" if removed.startswith("left") else "left"
        sides["renal_cyst"] = sides["kidney_stone"] = other
    normal = {"liver": rng.uniform(1300, 1850), "spleen": rng.uniform(170, 310), "heart": rng.uniform(520, 720)}
    large = {"liver": rng.uniform(2700, 3500), "spleen": rng.uniform(680, 1200), "heart": rng.uniform(1020, 1350)}
    for kind, organ in (("hepatomegaly", "liver"), ("splenomegaly", "spleen"), ("cardiomegaly", "heart")):
        if kind in types:
            normal[organ] = large[organ]
    return {
        "sides": sides,
        "removed": removed,
        "removed list": [removed] if "absent_organ" in types else [],
        "targets": normal,
        "gap": rng.uniform(6, 15) if "ascites" in types else 0.0,
        "amount": {"pleural_effusion": rng.uniform(16, 72), "pneumothorax": rng.uniform(22, 60)},
        "noise": rng.uniform(8, 22),
    }


def _field_of_view(rng: np.random.Generator, body: Body, region: str) -> np.ndarray:
    if "thorax" in region:
        top = rng.uniform(366, 388)
    else:
        # Many an abdominal scan begins below the dome of the liver.
        top = body.dome_right + (rng.uniform(-45, 5) if rng.random() < 0.3 else rng.uniform(8, 28))
    low = {"thorax": (25, 72), "abdomen": (-95, -55), "thorax and abdomen": (-95, -50)}.get(region, (-262, -222))
    bottom = rng.uniform(*low)
    zoom = rng.uniform(0.86, 0.97) if rng.random() < 0.12 else rng.uniform(1.0, 1.14)
    width = float(np.clip(2 * (172 + body.fat_mm) * body.scale[0] * zoom, 300, 500))
    middle = np.array([rng.normal(-14, 7), rng.normal(0, 7)])
    sides = [[m - width / 2, m + width / 2] for m in middle]
    return np.array([[bottom * body.scale[2], top * body.scale[2]], *sides])


def write_phantom(phantom: Phantom, directory: str | Path, max_matrix: int = 512) -> NativePhantom:
    """Write ct.nii.gz, structures.nii.gz, findings.nii.gz, labels.json and facts.json; return what was written."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    native = phantom.native(max_matrix)
    for name, array in (("ct", native.voxels), ("structures", native.structures), ("findings", native.findings)):
        image = nib.Nifti1Image(array.transpose(2, 1, 0), native.affine)
        image.set_qform(native.affine, 1)
        image.set_sform(native.affine, 1)
        image.header.set_xyzt_units("mm")
        nib.save(image, directory / f"{name}.nii.gz")
    labels = {"structures": STRUCTURES, "findings": FINDINGS}
    (directory / "labels.json").write_text(json.dumps(labels, indent=1) + "\n")
    (directory / "facts.json").write_text(json.dumps(phantom.facts, indent=1) + "\n")
    return native
