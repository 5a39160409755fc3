"""A server around the small model, in this process or on a port of its own."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.server.app import create_app
from medvl_sam2.engine.server.auth import ApiKeys
from medvl_sam2.engine.server.settings import ServerSettings

KEYS = ["alice-has-a-long-key", "bob-has-another-long-key"]


@pytest.fixture(scope="session")
def engine(small_model: Path) -> MedVLEngine:
    return MedVLEngine.from_pretrained(small_model, device="cpu")


@pytest.fixture(scope="session")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ball in air, on an oblique grid with axes in an unusual order."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (20, 24, 12)), indexing="ij"))
    rng = np.random.default_rng(0)
    voxels = np.where((grid**2).sum(0) < 0.7, 60, -1000) + rng.normal(0, 15, grid.shape[1:])
    affine = np.array([[0, -2, 0, 30], [1.9, 0, 0.4, -20], [-0.4, 0, 3, 5], [0, 0, 0, 1.0]])
    path = tmp_path_factory.mktemp("scan") / "ball.nii.gz"
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), affine), path)
    return path


@pytest.fixture
def make_app(engine, tmp_path):
    def make(keys: list[str] | None = None, **limits) -> FastAPI:
        settings = ServerSettings(data=tmp_path / "data", **limits)
        return create_app(engine, "small", settings, ApiKeys(keys or []))

    return make


@pytest.fixture
def client(make_app) -> Iterator[TestClient]:
    with TestClient(make_app(), raise_server_exceptions=False) as client:
        yield client


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serve an app on a free port; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=30))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def serving():
    """`listening`, for tests of a module imported by path."""
    return listening


def upload(client, path: Path, **options) -> dict:
    """Upload a scan; what the server says of it."""
    with path.open("rb") as stream:
        answer = client.post("/v1/volumes", files={"file": (path.name, stream)}, **options)
    assert answer.status_code == 201, answer.text
    return answer.json()


@pytest.fixture(name="upload")
def _upload():
    return upload
