"""Fixtures of the slice runner's and the sessions' tests."""

import sys
from pathlib import Path

import pytest

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.model.sam2 import SAM2, SliceFeatures

sys.path.append(str(Path(__file__).parent))

from _scans import ball
from _slices import CONFIG, make_features, randomise


@pytest.fixture(scope="module")
def sam2() -> SAM2:
    return randomise(SAM2(CONFIG))


@pytest.fixture(scope="module")
def runner(sam2: SAM2) -> SliceRunner:
    return SliceRunner(sam2)


@pytest.fixture(scope="module")
def exact_sam2() -> SAM2:
    return randomise(SAM2(CONFIG)).double()


@pytest.fixture(scope="module")
def features() -> SliceFeatures:
    return make_features()


@pytest.fixture(scope="module")
def engine(small_model):
    return MedVLEngine.from_pretrained(small_model, device="cpu")


@pytest.fixture
def session(engine):
    return engine.open(ball())
