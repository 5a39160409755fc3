"""Fixtures that several folders of tests share."""

import importlib.util
from pathlib import Path

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``gpu`` without one, before their fixtures look for it."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _exact(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU float32 is float32 in tests, and not TF32."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans beside the checkout; a test that needs it is skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "MANIFEST.md").is_file():
        pytest.skip(f"no real scans at {folder}")
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a small model with random weights."""
    # Imported here, so that tests of the kernels alone do not load the whole model.
    spec = importlib.util.spec_from_file_location("_small_model", Path(__file__).with_name("_small_model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_small_model(tmp_path_factory.mktemp("model"))
