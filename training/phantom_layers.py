"""The layers of one patient in the order they are painted; here the surface and the chest."""

from __future__ import annotations

import numpy as np

from medvl_sam2.training.anatomy import Body
from medvl_sam2.training.phantom_bones import spine
from medvl_sam2.training.phantom_findings import FINDINGS, LATTICE_ORIGIN, Finding
from medvl_sam2.training.phantom_render import EVERYWHERE, KEEP, Part, Value
from medvl_sam2.training.phantom_shapes import Ellipsoid, Grid, Tube, lattice_noise, outline, rotation, smooth_path
from medvl_sam2.training.phantom_trunk import abdomen_layers, skeleton_layers


class Painter:
    """Builds the layers of one patient once and paints them on any grid."""

    def __init__(self, body: Body, found: list[Finding], plan: dict[str, object], structures: dict[str, int]) -> None:
        self.body, self.found, self.plan, self.structures = body, found, plan, structures
        self.rng = np.random.default_rng((body.seed, 11))
        self.coarse = self.rng.standard_normal((70, 40, 46)).astype(np.float32)
        self.slow = self.rng.standard_normal((26, 16, 18)).astype(np.float32)
        self.fine = self.rng.standard_normal((110, 66, 80)).astype(np.float32)
        self.parts = [
            *self._surface(),
            *self._chest(),
            *abdomen_layers(self),
            *skeleton_layers(self),
        ]

    def add_textures(self, grid: Grid) -> None:
        """Add the random fields that tissues share: "slow" (34 mm cells), "texture" (12 mm) and "fine" (7 mm)."""
        grid.fields["texture"] = lattice_noise(self.coarse, LATTICE_ORIGIN, 12.0, grid)
        grid.fields["slow"] = lattice_noise(self.slow, LATTICE_ORIGIN, 34.0, grid)
        grid.fields["fine"] = lattice_noise(self.fine, LATTICE_ORIGIN, 7.0, grid)

    def tissue(self, hu: float, amplitude: float) -> Value:
        """Value of a tissue: `hu` with texture of `amplitude` HU."""
        return lambda grid, d: grid.fields["texture"] * np.float32(amplitude) + np.float32(hu)

    def organ(self, name: str, value: Value) -> list[Part]:
        """The layer of an organ, none when it was removed."""
        if name in self.plan["removed list"]:
            return []
        shape, box = self.body.organs[name]
        return [Part(shape, box, value, self.structures[name])]

    def finding(self, kind: str, organ: str | None = None) -> list[Part]:
        """The layers of the findings of one type, limited to one organ when given."""
        parts = []
        for f in self.found:
            if f.type != kind or f.shape is None or (organ and f.organ != organ):
                continue
            inside = self.structures[f.inside] if f.inside else 0
            label = self.structures[f.organ] if f.keeps else 0
            value = f.hu if callable(f.hu) else self.tissue(f.hu, 3.0)
            parts.append(Part(f.shape, f.box, value, label, FINDINGS[kind], inside, f.fuzzy_mm))
        return parts

    def _surface(self) -> list[Part]:
        body, fat = self.body, self.body.hu["fat"]
        cage = [lambda grid, k=k: body.profile(f"muscle {k}", grid.profile_z) for k in "abc"]
        belly = body.fat_mm * (1.5 if body.sex == "male" else 1.1)

        def muscle(grid: Grid) -> np.ndarray:
            return outline(grid, cage[0](grid), cage[1](grid), cage[2](grid), 0.32)

        def skin(grid: Grid) -> np.ndarray:
            z = grid.profile_z
            share = np.interp(z, (-250, -120, 0, 150, 300, 370), (1.3, 1.2, 1.0, 0.6, 0.5, 0.6)).astype(np.float32)
            front = np.interp(z, (-250, -60, 100, 250), (0.9, 1.0, 0.7, 0.4)).astype(np.float32)
            a = cage[0](grid) + body.fat_mm * share + 3
            b = cage[1](grid) + (belly * front + body.fat_mm * share * 0.6) * 0.5 + 3
            c = cage[2](grid) - (belly * front - body.fat_mm * share * 0.6) * 0.5
            return outline(grid, a, b, c, 0.32)

        back, bend = 100 + body.fat_mm, float(self.rng.choice([0.0, 1 / 900, 1 / 1500]))
        streak = self.rng.uniform(50, 150)

        def table(grid: Grid) -> np.ndarray:
            curve = grid.axes[0].astype(np.float32) ** 2 * np.float32(bend)
            y = grid.axes[1][None, :, None] - np.float32(back + 6) + curve[None, None, :]
            d = np.abs(np.abs(y) - 7) - 1.5
            d = np.maximum(d, np.abs(grid.axes[0])[None, None, :] - 205)
            return np.broadcast_to(d, grid.x.shape).astype(np.float32).copy()

        def skin_value(grid: Grid, d: np.ndarray) -> np.ndarray:
            return np.where(d > -2, np.float32(-10), np.float32(fat)) + grid.fields["texture"] * 6

        def muscle_value(grid: Grid, d: np.ndarray) -> np.ndarray:
            value = np.clip(1 - np.abs(grid.fields["slow"]) * np.float32(9), 0, 1)
            value *= np.float32(-streak)
            value += grid.fields["texture"] * 6
            value += np.float32(body.hu["muscle"])
            return value

        parts = [Part(table, (-220, 220, 40, 220, -500, 500), float(self.rng.uniform(-600, 0)))]
        if body.sex == "female":
            size = self.rng.uniform(38, 62)
            for side in (-1, 1):
                breast = Ellipsoid((side * 80.0, -118.0, 232.0), (size * 1.25, size, size * 1.15))
                parts.append(Part(breast, breast.box, self.tissue(fat + 15, 22)))
        for side in (-1, 1):
            for width, value in ((50.0 + body.fat_mm * 0.5, fat), (42.0, body.hu["muscle"])):
                arm = Tube(np.array([[side * 158.0, 8, 335], [side * 190.0, -10, 475]]), np.array([width, width * 0.9]))
                parts.append(Part(arm, arm.box, value))
        parts.append(Part(skin, EVERYWHERE, skin_value))
        parts.append(Part(muscle, EVERYWHERE, muscle_value))

        def cavity(grid: Grid) -> np.ndarray:
            return np.maximum(grid.fields["cage"], -218 - grid.z)

        def fat_value(grid: Grid, d: np.ndarray) -> np.ndarray:
            value = np.clip(grid.fields["fine"] - np.float32(1.3), 0, 1)
            value *= np.float32(150)
            value += grid.fields["texture"] * 7
            value += np.float32(fat + 5)
            return value

        for side in (-1, 1):
            axilla = Ellipsoid((side * 130.0, -24.0, 305.0), (17, 36, 48), rotation(0, 0, side * 20))
            parts.append(Part(axilla, axilla.box, self.tissue(fat + 10, 25)))
        parts.append(Part(cavity, (-150, 150, -145, 90, -220, 400), fat_value))
        return parts

    def _chest(self) -> list[Part]:
        body, hu, s = self.body, self.body.hu, self.structures
        parts: list[Part] = []

        def lung_value(base: float) -> Value:
            def value(grid: Grid, d: np.ndarray) -> np.ndarray:
                mixed = np.clip(grid.fields["fine"] - 1.25, 0, 1.2) * 300
                mixed += np.float32(base)
                mixed += grid.y * np.float32(0.28)
                mixed += grid.fields["texture"] * 12
                return mixed

            return value

        for name in ("left lung", "right lung"):
            pleura, box = body.extra[f"{name} pleura"]
            for f in self.found:
                if f.organ == name and f.type in ("pleural_effusion", "pneumothorax"):
                    tissue = self.tissue(f.hu, 3.0)
                    parts.append(Part(pleura, box, tissue, 0, FINDINGS[f.type]))
            collapsed = any(f.type == "pneumothorax" and f.organ == name for f in self.found)
            parts.append(Part(*body.organs[name], lung_value(hu["lung"] + 90 * collapsed), s[name]))
        vessel_hu = (hu["right heart"] + hu["left heart"]) / 2
        for name, side in (("left lung", 1), ("right lung", -1)):
            for tube in self._lung_vessels(side):
                parts.append(Part(tube, tube.box, vessel_hu, KEEP, KEEP, s[name]))
        parts += self.finding("consolidation") + self.finding("lung_nodule")
        _, column, column_box = spine(body)
        parts.append(Part(lambda grid: column(grid) - np.float32(2), (*column_box[:4], 60.0, 400.0), 25.0, 0))
        egg, box = body.organs["heart"]
        wide = tuple(np.array(box) + np.array([-6, 6, -6, 6, -6, 6]))
        parts.append(Part(lambda grid: egg(grid) - np.float32(5), wide, hu["fat"] + 8, 0))
        parts += self._great_vessels()
        parts += self.organ("heart", self.tissue(hu["myocardium"], 5))
        parts += self._chambers()
        for side in (-1, 1):
            c = body.extra["carina"]
            tube = smooth_path(
                [c, c + [side * 20, 6, -18], c + [side * 42, 14, -34], c + [side * 62, 20, -62]],
                [7.5, 6.5, 5.5, 3.5],
                7,
            )
            parts.append(Part(tube, tube.box, -930.0, 0))
        parts += self.organ("esophagus", self.tissue(hu["wall"] - 4, 14))
        shape, box = body.organs["trachea"]
        parts.append(Part(lambda grid: shape(grid) - np.float32(2), box, 20.0, 0))
        parts += self.organ("trachea", -985.0)
        return parts

    def _lung_vessels(self, side: int) -> list[Tube]:
        rng, tubes = self.rng, []
        hilum = self.body.extra["carina"] + np.array([side * 40, 12, -38])
        for _ in range(9):
            direction = rng.normal(0, 1, 3) * [0.7, 0.8, 1.0] + [side * 0.7, 0, 0]
            direction /= np.linalg.norm(direction)
            reach = rng.uniform(60, 105)
            middle = hilum + direction * reach * 0.5 + rng.normal(0, 6, 3)
            end = hilum + direction * reach + rng.normal(0, 8, 3)
            tubes.append(Tube(np.array([hilum, middle, end]), np.array([4.6, 2.8, 1.4])))
            for start in (middle, (middle + end) / 2):
                branch = start + (direction + rng.normal(0, 0.7, 3)) * rng.uniform(22, 40)
                tubes.append(Tube(np.array([start, branch]), np.array([2.2, 1.0])))
        return tubes

    def _great_vessels(self) -> list[Part]:
        body, hu = self.body, self.body.hu
        hx, hy, hz = body.extra["heart center"]
        carina = body.extra["carina"]
        parts = []

        def vessel(points: list, radii: list, value: float) -> None:
            tube = smooth_path(points, radii, 3 * len(points))
            parts.append(Part(tube, tube.box, value, 0))

        right = hu["right heart"]
        split = carina + [4, -20, -26]
        vessel([[hx + 4, hy - 22, hz + 26], [hx + 6, hy - 8, hz + 48], split], [14, 14, 12], right)
        vessel([split, carina + [-30, -4, -30], carina + [-52, 6, -40]], [11, 10, 7], right)
        vessel([split, carina + [30, 4, -20], carina + [52, 16, -32]], [11, 10, 7], right)
        vessel(
            [[hx - 44, hy, hz + 10], [-24, carina[1] - 14, carina[2] - 30], [-22, carina[1] - 18, carina[2] + 34]],
            [11, 9, 8],
            (right + hu["veins"]) / 2,
        )
        vessel(
            [
                [-22, carina[1] - 18, carina[2] + 34],
                [4, carina[1] - 34, carina[2] + 44],
                [44, carina[1] - 28, carina[2] + 62],
            ],
            [8, 6, 6],
            hu["veins"],
        )
        arch = body.organs["aorta"][1][5] - 12
        for x, dx, dy in ((-8, -14, 0), (4, 12, 4), (16, 26, 10)):
            vessel(
                [
                    [x, body.spine_y(arch) - 46, arch],
                    [x + dx, body.spine_y(arch + 50) - 36 + dy, arch + 50],
                    [x + dx * 1.6, body.spine_y(arch + 110) - 26, arch + 110],
                ],
                [6, 5, 4],
                hu["aorta"],
            )
        return parts

    def _chambers(self) -> list[Part]:
        body, hu = self.body, self.body.hu
        center = np.array(body.extra["heart center"])
        size = (self.plan["targets"]["heart"] / 650) ** (1 / 3)
        heart = self.structures["heart"]
        parts = []
        for offset, radii, blood in (
            ([24, 2, -6], (27, 20, 20), "left heart"),
            ([8, -24, -8], (30, 17, 26), "right heart"),
            ([-4, 24, 16], (28, 17, 22), "left heart"),
            ([-34, -4, 6], (19, 24, 30), "right heart"),
        ):
            turn = rotation(0, 22, -32)
            chamber = Ellipsoid(tuple(center + np.array(offset) * size), tuple(np.array(radii) * size), turn)
            parts.append(Part(chamber, chamber.box, self.tissue(hu[blood], 6), KEEP, KEEP, heart, 2.0))
        return parts
