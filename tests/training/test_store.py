"""Phantoms drawn for training."""

import numpy as np
import pytest

from medvl_sam2.training.phantom import make_phantom
from medvl_sam2.training.store import draw_phantom


def test_rich_phantoms_show_more_findings_and_the_rest_are_as_drawn():
    usual, rich = (
        np.mean([len(draw_phantom(seed, share).facts["findings"]) for seed in range(12)]) for share in (0.0, 1.0)
    )
    assert rich > usual + 0.8
    assert all(draw_phantom(seed, 0.0).facts == make_phantom(seed).facts for seed in range(2))


def test_the_share_of_rich_phantoms_is_the_one_asked_for():
    changed = [draw_phantom(seed, 0.5).facts != make_phantom(seed).facts for seed in range(24)]
    assert 5 <= sum(changed) <= 19


def test_evaluation_seeds_are_refused():
    with pytest.raises(ValueError, match="evaluation"):
        draw_phantom(1_000_000, 0.5)
