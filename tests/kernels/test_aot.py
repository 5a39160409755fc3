"""Every kernel and shipped tile compiles for sm_80 and sm_90 without a GPU, and no worse than it did.

Hard limits hold for any Triton; the comparison with ``aot_golden.json`` for the version that wrote it. After a change
that is meant, rewrite the file: ``python -m medvl_sam2.kernels._aot tests/kernels/aot_golden.json``.
"""

import json
from pathlib import Path

import pytest

from medvl_sam2.kernels._aot import SHARED_LIMIT, all_targets, inspect_variant
from medvl_sam2.kernels._common import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
GOLDEN = json.loads((Path(__file__).parent / "aot_golden.json").read_text())
TARGETS = all_targets() if HAS_TRITON else {}


def _same_version() -> bool:
    import triton

    return triton.__version__ == GOLDEN["triton"]


def test_the_golden_file_lists_exactly_the_variants_there_are():
    assert set(GOLDEN["findings"]) == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_variant_compiles_as_well_as_it_did(name):
    variant, capability = TARGETS[name]
    found = inspect_variant(variant, capability)
    assert found["spills"] == 0 and found["local"] == 0, found
    assert found["shared"] <= SHARED_LIMIT[capability], found
    if variant.wgmma and capability >= 90:
        assert found["hgmma"] > 0 and found["hmma"] == 0, found
    if not _same_version():
        return
    golden = GOLDEN["findings"][name]
    assert found["registers"] <= golden["registers"] + max(8, golden["registers"] // 10), (found, golden)
    assert found["shared"] <= golden["shared"] + 1024, (found, golden)
    assert found["instructions"] <= 1.25 * golden["instructions"] + 64, (found, golden)
    assert found["wide_loads"] >= 0.75 * golden["wide_loads"], (found, golden)
