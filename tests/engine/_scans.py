"""A scan for tests of sessions, and a way to decide what a random model says about it."""

from dataclasses import replace

import numpy as np

from medvl_sam2.engine.geometry import Volume
from medvl_sam2.model.prompts import SEGMENT_ANSWER

SHAPE = (18, 40, 36)


def ball(seed: int = 0) -> Volume:
    """A noisy ball, stored right to left and feet last."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    voxels = np.where((grid**2).sum(0) < 0.8, 60, -1000) + rng.normal(0, 15, SHAPE)
    affine = np.array([[1.5, 0, 0, -30], [0, 1.5, 0, -25], [0, 0, -3, 40], [0, 0, 0, 1.0]])
    return Volume.from_array(voxels.astype(np.int16), affine=affine)


def decide(monkeypatch, session, **said):
    """Make the random model say whether a target is there."""
    language = session._engine.language
    forced, first = language.forced, session._engine.chat.answer(SEGMENT_ANSWER)[0]
    monkeypatch.setattr(
        language, "forced", lambda *a: [replace(result, **{"first": first, **said}) for result in forced(*a)]
    )
