"""Uploads that should not come in: each is told why, leaves nothing behind, and the server goes on."""

import gzip
import io
import resource
import zipfile
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
from fastapi.testclient import TestClient

from medvl_sam2.engine.volumes import read_volume

RAW = {"content-type": "application/octet-stream"}


def nifti(shape=(8, 8, 8), dtype=np.int16, fill=0) -> bytes:
    return nib.Nifti1Image(np.full(shape, fill, dtype), np.diag([1, 1, 2, 1])).to_bytes()


def with_shape(raw: bytes, *shape: int) -> bytes:
    """A NIfTI header that promises another shape."""
    dim = np.frombuffer(raw[40:56], np.int16).copy()
    dim[1 : 1 + len(shape)] = shape
    return raw[:40] + dim.tobytes() + raw[56:]


def zipped(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


BAD = {
    "empty": (b"", 400, "empty"),
    "text": (b"this is not a scan", 415, "NIfTI"),
    "gzipped_text": (gzip.compress(b"this is not a scan either"), 400, "header"),
    "cut_short": (gzip.compress(np.random.default_rng(0).bytes(50_000))[:900], 400, ""),
    "truncated": (gzip.compress(nifti()[:700]), 400, ""),
    "terabytes": (with_shape(nifti(), 30_000, 30_000, 30_000), 413, "voxels"),
    "terabytes_gz": (gzip.compress(with_shape(nifti(), 30_000, 30_000, 30_000)), 413, "voxels"),
    "promises_more": (with_shape(nifti(), 400, 400, 400), 400, "promises"),
    "negative": (with_shape(nifti(), -5, 8, 8), 400, ""),
    "frames": (nifti((8, 8, 8, 3)), 400, "frames"),
    "gzip_bomb": (gzip.compress(nifti() + bytes(80 << 20)), 400, "long after"),
    "zip_bomb": (zipped(("a.dcm", bytes(70 << 20))), 413, "unpacks"),
    "zip_traversal": (zipped(("../../evil.dcm", b"x" * 500)), 400, "outside the archive"),
    "zip_absolute": (zipped(("/tmp/evil.dcm", b"x" * 500)), 400, "outside the archive"),
    "zip_without_dicom": (zipped(("readme.txt", b"hello")), 400, ""),
    "zip_damaged": (zipped(("a.dcm", b"x" * 500))[:60], 400, "header"),
    "infinite": (nifti(dtype=np.float32, fill=np.inf), 400, ""),
}


@pytest.fixture
def guarded(make_app):
    with TestClient(make_app(max_unpacked=64 << 20, max_upload=1 << 20), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("kind", BAD)
def test_bad_scan(guarded, tmp_path, kind):
    content, status, word = BAD[kind]
    answer = guarded.post("/v1/volumes", content=content, headers=RAW)
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    assert word in message
    assert str(tmp_path) not in message and "/vol_" not in message
    assert list((tmp_path / "data").iterdir()) == []
    assert guarded.get("/health").status_code == 200


def test_bad_body(guarded, scan, tmp_path):
    content = scan.read_bytes()
    cases = [
        ({"files": {"file": ("big.nii", bytes(2 << 20))}}, 413),
        ({"content": iter([bytes(1 << 19)] * 4), "headers": RAW}, 413),
        ({"content": content, "headers": {"content-type": "text/plain"}}, 415),
        ({"content": content}, 415),
        ({"content": content, "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"content": content, "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400),
        ({"data": {"note": "no file"}, "files": {"other": (None, "text")}}, 400),
        ({"files": [("file", ("a.nii", content)), ("file", ("b.nii", content))]}, 400),
        (
            {
                "content": b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + content,
                "headers": {"content-type": "multipart/form-data; boundary=x"},
            },
            400,
        ),
    ]
    for request, status in cases:
        answer = guarded.post("/v1/volumes", **request)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]
    assert list((tmp_path / "data").iterdir()) == []


def test_a_client_cannot_name_files(client, scan, tmp_path):
    name = "../../../etc/passwd.nii.gz"
    with scan.open("rb") as stream:
        answer = client.post("/v1/volumes", files={"file": (name, stream)})
    assert answer.json()["name"] == name
    (folder,) = (tmp_path / "data").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["scan.nii.gz", "volume.json"]


def test_zip_with_a_dicom_series(client, shared_data):
    series = next(path for path in sorted(shared_data.rglob("*.dcm"))).parent
    files = sorted(series.glob("*.dcm"))
    content = zipped(*((f"study/{path.name}", path.read_bytes()) for path in files))
    answer = client.post("/v1/volumes", content=content, headers=RAW)
    volume = read_volume(series)
    assert answer.status_code == 201, answer.text
    assert answer.json()["shape"] == list(volume.source.shape[:3])


def test_full_disk(client, scan, upload, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    volume = upload(client, scan)["id"]
    try:
        # The system refuses to write on, as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        answer = client.post("/v1/volumes", content=scan.read_bytes(), headers=RAW)
        click = {"points": [[10, 12, 6]], "format": "nifti"}
        mask = client.post(f"/v1/volumes/{volume}/segment", json=click)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (answer.status_code, mask.status_code) == (507, 507)
    assert answer.json()["error"]["code"] == mask.json()["error"]["code"] == "disk_full"
    assert [path.name for path in (tmp_path / "data").iterdir()] == [volume]
    upload(client, scan)


def test_corrupt_scans_among_good_ones(client, scan, upload):
    good, bad = scan.read_bytes(), scan.read_bytes()[:-600]
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda i: client.post("/v1/volumes", content=bad if i % 3 == 0 else good, headers=RAW), range(12))
        )
    assert [answer.status_code for answer in answers] == [400 if i % 3 == 0 else 201 for i in range(12)]
    assert len(client.get("/v1/volumes").json()["data"]) == 8


def test_quota_of_scans(make_app, scan, upload):
    with TestClient(make_app(max_volumes=1)) as client:
        first = upload(client, scan)["id"]
        assert client.post("/v1/volumes", content=scan.read_bytes(), headers=RAW).status_code == 409
        client.delete(f"/v1/volumes/{first}")
        upload(client, scan)
