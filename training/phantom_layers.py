"""The layers of one patient in the order they are painted: surface, chest, abdomen, skeleton."""

from __future__ import annotations

import numpy as np

from medvl_sam2.training import phantom_bones as bones
from medvl_sam2.training.anatomy import Body
from medvl_sam2.training.phantom_findings import FINDINGS, LATTICE_ORIGIN, Finding
from medvl_sam2.training.phantom_render import EVERYWHERE, KEEP, Part, Value
from medvl_sam2.training.phantom_shapes import Ellipsoid, Grid, Tube, lattice_noise, outline, rotation, smooth_path


class Painter:
    """Builds the layers of one patient once and paints them on any grid."""

    def __init__(self, body: Body, found: list[Finding], plan: dict[str, object], structures: dict[str, int]) -> None:
        self.body, self.found, self.plan, self.structures = body, found, plan, structures
        self.rng = np.random.default_rng((body.seed, 11))
        self.coarse = self.rng.standard_normal((70, 40, 46)).astype(np.float32)
        self.fine = self.rng.standard_normal((110, 66, 80)).astype(np.float32)
        self.parts = [
            *self._surface(),
            *self._chest(),
            *self._abdomen(),
            *self._skeleton(),
        ]

    def add_textures(self, grid: Grid) -> None:
        """Add the two random fields that tissues share: "texture" (12 mm cells) and "fine" (7 mm cells)."""
        grid.fields["texture"] = lattice_noise(self.coarse, LATTICE_ORIGIN, 12.0, grid)
        grid.fields["fine"] = lattice_noise(self.fine, LATTICE_ORIGIN, 7.0, grid)

    def _tissue(self, hu: float, amplitude: float) -> Value:
        return lambda grid, d: grid.fields["texture"] * np.float32(amplitude) + np.float32(hu)

    def _organ(self, name: str, value: Value) -> list[Part]:
        if name in self.plan["removed list"]:
            return []
        shape, box = self.body.organs[name]
        return [Part(shape, box, value, self.structures[name])]

    def _finding(self, kind: str, organ: str | None = None) -> list[Part]:
        parts = []
        for f in self.found:
            if f.type != kind or f.shape is None or (organ and f.organ != organ):
                continue
            inside = self.structures[f.inside] if f.inside else 0
            label = self.structures[f.organ] if f.keeps else 0
            value = self._tissue(f.hu, 3.0) if f.hu is not None else 0.0
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

        back = 122 + body.fat_mm * 0.5

        def table(grid: Grid) -> np.ndarray:
            curve = grid.axes[0].astype(np.float32) ** 2 * np.float32(1 / 900)
            y = grid.axes[1][None, :, None] - np.float32(back + 6) + curve[None, None, :]
            d = np.abs(np.abs(y) - 7) - 1.5
            d = np.maximum(d, np.abs(grid.axes[0])[None, None, :] - 205)
            return np.broadcast_to(d, grid.x.shape).astype(np.float32).copy()

        def skin_value(grid: Grid, d: np.ndarray) -> np.ndarray:
            return np.where(d > -2, np.float32(-10), np.float32(fat)) + grid.fields["texture"] * 6

        def muscle_value(grid: Grid, d: np.ndarray) -> np.ndarray:
            value = np.float32(body.hu["muscle"]) - np.maximum(grid.fields["texture"] - 0.9, 0) * 110
            value += grid.fields["texture"] * 5
            return value

        parts = [Part(table, (-220, 220, 60, 170, -500, 500), -180.0)]
        if body.sex == "female":
            size = self.rng.uniform(38, 62)
            for side in (-1, 1):
                breast = Ellipsoid((side * 80.0, -118.0, 232.0), (size * 1.25, size, size * 1.15))
                parts.append(Part(breast, breast.box, self._tissue(fat + 15, 22)))
        parts.append(Part(skin, EVERYWHERE, skin_value))
        parts.append(Part(muscle, EVERYWHERE, muscle_value))

        def cavity(grid: Grid) -> np.ndarray:
            return np.maximum(grid.fields["cage"], -218 - grid.z)

        parts.append(Part(cavity, (-150, 150, -145, 90, -220, 400), self._tissue(fat + 6, 7)))
        return parts

    def _chest(self) -> list[Part]:
        body, hu, s = self.body, self.body.hu, self.structures
        parts: list[Part] = []

        def lung_value(grid: Grid, d: np.ndarray) -> np.ndarray:
            value = np.clip(grid.fields["fine"] - 1.25, 0, 1.2) * 300
            value += np.float32(hu["lung"])
            value += grid.y * np.float32(0.28)
            value += grid.fields["texture"] * 12
            return value

        for name in ("left lung", "right lung"):
            pleura, box = body.extra[f"{name} pleura"]
            for f in self.found:
                if f.organ == name and f.type in ("pleural_effusion", "pneumothorax"):
                    tissue = self._tissue(f.hu, 3.0)
                    parts.append(Part(pleura, box, tissue, 0, FINDINGS[f.type]))
            parts.append(Part(*body.organs[name], lung_value, s[name]))
        vessel_hu = (hu["right heart"] + hu["left heart"]) / 2
        for name, side in (("left lung", 1), ("right lung", -1)):
            for tube in self._lung_vessels(side):
                parts.append(Part(tube, tube.box, vessel_hu, KEEP, KEEP, s[name]))
        parts += self._finding("consolidation") + self._finding("lung_nodule")
        egg, box = body.organs["heart"]
        wide = tuple(np.array(box) + np.array([-6, 6, -6, 6, -6, 6]))
        parts.append(Part(lambda grid: egg(grid) - np.float32(5), wide, hu["fat"] + 8, 0))
        parts += self._great_vessels()
        parts += self._organ("heart", self._tissue(hu["myocardium"], 5))
        parts += self._chambers()
        for side in (-1, 1):
            c = body.extra["carina"]
            tube = smooth_path(
                [c, c + [side * 20, 6, -18], c + [side * 42, 14, -34], c + [side * 62, 20, -62]],
                [7.5, 6.5, 5.5, 3.5],
                7,
            )
            parts.append(Part(tube, tube.box, -930.0, 0))
        parts += self._organ("esophagus", self._tissue(hu["wall"] - 4, 14))
        shape, box = body.organs["trachea"]
        parts.append(Part(lambda grid: shape(grid) - np.float32(2), box, 20.0, 0))
        parts += self._organ("trachea", -985.0)
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
            parts.append(Part(chamber, chamber.box, self._tissue(hu[blood], 6), KEEP, KEEP, heart, 2.0))
        return parts

    def _abdomen(self) -> list[Part]:
        body, hu, s, rng = self.body, self.body.hu, self.structures, self.rng
        parts: list[Part] = []
        for f in self.found:
            if f.type == "ascites":
                parts += [
                    Part(*f.extra[key], self._tissue(f.hu, 3.0), 0, FINDINGS["ascites"]) for key in ("gutters", "pool")
                ]
        parts += self._muscles() + self._bowel() + self._vessels()
        parts += self._organ("stomach", self._stomach_value())
        parts += self._organ("liver", self._tissue(hu["liver"], 4))
        parts += self._liver_vessels() + self._finding("liver_lesion")
        parts += self._organ("pancreas", self._tissue(hu["pancreas"], 16))
        parts += self._organ("gallbladder", self._tissue(rng.normal(10, 5), 2))
        spleen_texture = 22 if body.phase == "arterial" else 4
        parts += self._organ("spleen", self._tissue(hu["spleen"], spleen_texture))
        cortex, medulla, contrast = hu["kidney cortex"], hu["kidney medulla"], rng.random() < 0.3

        def kidney(grid: Grid, d: np.ndarray) -> np.ndarray:
            depth = np.clip((-d - 4) * np.float32(0.25) + grid.fields["fine"] * np.float32(0.5), 0, 1)
            return depth * np.float32(medulla - cortex) + np.float32(cortex)

        for name in ("left kidney", "right kidney"):
            if name in self.plan["removed list"]:
                continue
            shape, box = body.organs[name]
            wide = tuple(np.array(box) + np.array([-7, 7, -7, 7, -7, 7]))
            parts.append(Part(lambda grid, f=shape: f(grid) - np.float32(6), wide, hu["fat"], 0))
            sinus = body.extra[f"{name} sinus"]
            pelvis = Ellipsoid(sinus.center, tuple(0.5 * r for r in sinus.radii), sinus.turn)
            parts.append(Part(sinus, sinus.box, hu["fat"] + 15, 0))
            parts.append(Part(pelvis, pelvis.box, 10.0 if not (contrast and body.phase != "arterial") else 60.0, 0))
            parts += self._organ(name, kidney)
            parts += self._finding("renal_cyst", name) + self._finding("kidney_stone", name)
        for name in ("left adrenal gland", "right adrenal gland"):
            parts += self._organ(name, self._tissue(hu["adrenal"], 5))
        parts += self._organ("inferior vena cava", self._tissue(hu["veins"] * 0.97, 3))
        parts += self._organ("aorta", self._tissue(hu["aorta"], 3)) + self._finding("aortic_aneurysm")
        gland = (
            Ellipsoid((0.0, -14.0, -212.0), (23, 17, 17))
            if body.sex == "male"
            else Ellipsoid((rng.normal(0, 6), -6.0, -172.0), (27, 21, 30))
        )
        parts.append(Part(gland, gland.box, self._tissue(hu["wall"], 8), 0))
        bladder, box = body.organs["urinary bladder"]
        wide = tuple(np.array(box) + np.array([-3, 3, -3, 3, -3, 3]))
        parts.append(Part(lambda grid: bladder(grid) - np.float32(2.5), wide, 35.0, s["urinary bladder"]))
        parts.append(Part(bladder, box, self._tissue(rng.uniform(2, 14), 2), KEEP))
        return parts

    def _muscles(self) -> list[Part]:
        hu, parts = self.body.hu, []
        for side in (-1, 1):
            y = [float(self.body.spine_y(z)) for z in (60, 0, -60)]
            psoas = smooth_path(
                [[side * 26, y[0] + 8, 66], [side * 42, y[1] + 4, 0], [side * 54, y[2] - 8, -60], [side * 72, -42, -120], [side * 92, -50, -185], [side * 112, -30, -240]],
                [9, 20, 25, 23, 20, 14], 14,
            )  # fmt: skip
            iliacus = smooth_path(
                [[side * 100, -22, -62], [side * 96, -28, -100], [side * 88, -40, -150]], [9, 17, 16], 8
            )
            paraspinal = smooth_path(
                [
                    [side * 32, self.body.spine_y(z) + (70 if z < 120 else 48), z]
                    for z in (-120, -60, 0, 60, 120, 200, 300)
                ],
                [18, 23, 25, 24, 20, 15, 12],
                14,
                1.35,
            )
            for tube in (psoas, iliacus, paraspinal):
                parts.append(Part(tube, tube.box, self._tissue(hu["muscle"], 7), 0))
        return parts

    def _bowel(self) -> list[Part]:
        hu, rng, parts = self.body.hu, self.rng, []
        content = float(rng.choice([22.0, 35.0, 160.0], p=[0.5, 0.4, 0.1]))
        for _ in range(13):
            start = np.array([rng.uniform(-78, 92), rng.uniform(-100, -38), rng.uniform(-135, 25)])
            steps = np.cumsum(np.vstack([np.zeros(3), rng.normal(0, 22, (4, 3))]), 0)
            points = np.clip(start + steps, [-92, -106, -160], [100, -28, 35])
            tube = smooth_path(points, np.full(5, rng.uniform(10, 15)), 9)
            gas = rng.random() < 0.12

            def value(grid: Grid, d: np.ndarray, gas: bool = gas) -> np.ndarray:
                inner = np.float32(-850) if gas else np.float32(content) + grid.fields["fine"] * 12
                return np.where(d > -2.5, np.float32(hu["wall"]), inner)

            parts.append(Part(tube, tube.box, value, 0))
        duodenum = smooth_path(
            [[-26, -76, 50], [-48, -60, 40], [-50, -46, 5], [-30, -46, -14], [10, -50, -8], [34, -56, 22]],
            [12, 13, 13, 12, 11, 11],
            14,
        )
        parts.append(Part(duodenum, duodenum.box, self._tissue(hu["wall"] - 10, 16), 0))
        stool = rng.uniform(-60, 40)
        gas_share = rng.normal(0.45, 0.35)

        def colon(grid: Grid, d: np.ndarray) -> np.ndarray:
            inner = np.float32(stool) + grid.fields["fine"] * 60
            inner = np.where(grid.fields["texture"] - (grid.y + 50) * 0.012 > gas_share, np.float32(-930), inner)
            return np.where(d > -2.5, np.float32(hu["wall"] - 5), inner)

        return parts + self._organ("colon", colon)

    def _stomach_value(self) -> Value:
        rng, wall = self.rng, self.body.hu["wall"]
        content = float(rng.choice([12.0, 40.0, 280.0], p=[0.45, 0.45, 0.1]))
        mottle = 30.0 if content == 40.0 else 4.0
        level = rng.uniform(-92, -50)

        def value(grid: Grid, d: np.ndarray) -> np.ndarray:
            inner = np.float32(content) + grid.fields["fine"] * np.float32(mottle)
            inner = np.where(grid.y < level, np.float32(-950), inner)
            return np.where(d > -4, np.float32(wall), inner)

        return value

    def _vessels(self) -> list[Part]:
        hu, y = self.body.hu, self.body.spine_y
        paths = [
            (
                [[-6, y(0) - 38, 22], [-4, y(40) - 44, 42], [-22, -62, 62], [-48, -52, 84]],
                [6, 6.5, 7, 7],
                hu["portal veins"],
            ),
            ([[-4, -52, 48], [36, -44, 60], [84, -14, 78]], [5, 4.5, 4], hu["portal veins"]),
            ([[2, y(70) - 32, 78], [6, y(40) - 46, 40], [4, -66, -30]], [5, 4, 3], hu["aorta"]),
        ]
        for side in (-1, 1):
            inner = 4 if side > 0 else -4
            paths += [
                (
                    [
                        [inner + 4, y(-36) - 28, -34],
                        [side * 34, -44, -95],
                        [side * 58, -46, -140],
                        [side * 84, -62, -215],
                    ],
                    [6.5, 5.5, 5, 4.5],
                    hu["aorta"],
                ),
                (
                    [[-10, y(-44) - 24, -44], [side * 34, -30, -100], [side * 56, -34, -145], [side * 76, -58, -215]],
                    [8, 7.5, 7, 6.5],
                    hu["veins"],
                ),
                (
                    [[side * 8, y(40) - 28, 42], [side * 34, -16, 38], [side * 52, -6, 36]],
                    [4.5, 4.5, 4.5],
                    hu["veins"] * 1.02,
                ),
            ]
        tubes = [(smooth_path(p, r, 3 * len(p)), value) for p, r, value in paths]
        return [Part(t, t.box, value, 0) for t, value in tubes]

    def _liver_vessels(self) -> list[Part]:
        hu, rng, parts = self.body.hu, self.rng, []
        low, high = np.array(self.body.organs["liver"][1]).reshape(3, 2).T
        hilum = np.array([-42.0, -50.0, 78.0])
        top = np.array([-28.0, -32.0, high[2] - 26])
        for start, radius, count in ((hilum, 5.5, 7), (top, 5.5, 5)):
            for _ in range(count):
                end = rng.uniform(low + 20, high - 20)
                bend = (start + end) / 2 + rng.normal(0, 9, 3)
                tube = smooth_path([start, bend, end], [radius, radius * 0.65, 1.3], 5)
                parts.append(Part(tube, tube.box, hu["portal veins"], KEEP, KEEP, self.structures["liver"]))
        return parts

    def _skeleton(self) -> list[Part]:
        body, s = self.body, self.structures
        dense = body.hu["bone"]

        def bone(inner: float, outer: float, cortex: float) -> Value:
            def value(grid: Grid, d: np.ndarray) -> np.ndarray:
                core = np.float32(inner * dense) + grid.fields["fine"] * np.float32(22)
                return np.where(d > -cortex, np.float32(outer * dense), core)

            return value

        vertebrae, discs, box = bones.spine(body)
        parts = [Part(discs, (-30, 30, -50, 62, box[4], box[5]), self._tissue(85, 5), 0)]
        for side, word in ((-1, "right"), (1, "left")):
            rib, cartilage, rib_box = bones.ribs(body, side)
            parts.append(Part(cartilage, rib_box, self._tissue(95, 14), KEEP))
            parts.append(Part(rib, rib_box, bone(210, 520, 2.0), s[f"{word} ribs"]))
            parts.append(Part(*bones.shoulder(side), bone(190, 600, 2.5), 0))
        cord = smooth_path([[0, body.spine_y(z) + 25, z] for z in range(-80, 441, 40)], [7.0] * 14, 14)
        parts.append(Part(vertebrae, box, bone(175, 420, 1.8), s["vertebrae"]))
        parts.append(Part(cord, cord.box, 32.0, KEEP, KEEP))
        parts.append(Part(*bones.sternum(body), bone(130, 380, 1.8), s["sternum"]))
        parts.append(Part(*bones.sacrum(), bone(120, 360, 2.0), s["sacrum"]))
        for side, word in ((-1, "right"), (1, "left")):
            parts.append(Part(*bones.hip_bone(side), bone(190, 600, 2.2), s[f"{word} hip bone"]))
            parts.append(Part(*bones.femur(side), bone(230, 800, 3.0), s[f"{word} femur"]))
        return parts
