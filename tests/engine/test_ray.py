"""Scale-out on a local Ray of two workers."""

import json
import socket
from contextlib import contextmanager

import httpx
import nibabel as nib
import numpy as np
import pytest

ray = pytest.importorskip("ray")

from medvl_sam2.engine import batch  # noqa: E402
from medvl_sam2.engine.server.auth import ApiKeys  # noqa: E402
from medvl_sam2.engine.server.replicas import serve_replicas  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("scans")
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (16, 18, 10)), indexing="ij"))
    for seed in range(4):
        voxels = np.where((grid**2).sum(0) < 0.4 + 0.1 * seed, 60, -1000)
        nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.diag([2, 2, 3, 1])), place / f"{seed}.nii.gz")
    (place / "bad.nii.gz").write_bytes(b"\x1f\x8b nothing")
    return place


def test_two_workers_write_what_one_writes(folder, small_model, tmp_path):
    job = batch.Job(model=str(small_model), device="cpu", targets=("liver",), questions=("What is seen?",))
    results = {}
    for workers in (1, 2):
        summary = batch.run(folder, tmp_path / str(workers), job, workers=workers)
        assert (summary["done"], summary["failed"]) == (4, 1)
        text = (tmp_path / str(workers) / batch.RESULTS).read_text()
        documents = sorted((json.loads(line) for line in text.splitlines()), key=lambda d: d["scan"])
        results[workers] = [{**document, "seconds": None} for document in documents]
    assert results[1] == results[2]
    assert batch.run(folder, tmp_path / "2", job, workers=2)["skipped"] == 4


@contextmanager
def replicas(model, data):
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve_replicas(
        str(model),
        replicas=2,
        host="127.0.0.1",
        port=port,
        data=data,
        keys=ApiKeys([]),
        engine={"device": "cpu"},
        limits={},
        blocking=False,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def test_every_replica_answers_for_every_scan(folder, small_model, tmp_path):
    with replicas(small_model, tmp_path / "data") as url, httpx.Client(base_url=url, timeout=120) as http:
        with (folder / "0.nii.gz").open("rb") as stream:
            volume = http.post("/v1/volumes", files={"file": stream}).json()["id"]
        click = {"points": [[8, 9, 5]]}
        masks = [http.post(f"/v1/volumes/{volume}/segment", json=click).json() for _ in range(12)]
        assert len({json.dumps(mask["rle"]) for mask in masks}) == 1
        for mask in masks:
            assert http.get(f"/v1/volumes/{volume}/masks/{mask['id']}").status_code == 200
        body = {"model": small_model.name, "volume_id": volume, "max_tokens": 5, "stream": True}
        body["messages"] = [{"role": "user", "content": "What is seen?"}]
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200 and answer.text.rstrip().endswith("[DONE]")
        assert http.delete(f"/v1/volumes/{volume}").status_code == 200
        assert {http.get(f"/v1/volumes/{volume}").status_code for _ in range(8)} == {404}
