"""The contract of every route, held to what the engine itself gives."""

import gzip

import httpx
import nibabel as nib
import numpy as np
import openai
import pytest
import torch

from medvl_sam2.engine.language.base import Step
from medvl_sam2.engine.server.masks import run_lengths


def decoded(rle: dict) -> np.ndarray:
    """As the schema tells users to decode it."""
    return np.repeat(np.arange(len(rle["counts"])) % 2, rle["counts"]).reshape(rle["shape"], order="F").astype(bool)


def bounds(mask: np.ndarray) -> list[int]:
    where = np.argwhere(mask)
    return [*where.min(0).tolist(), *where.max(0).tolist()]


def nifti(content: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(content))


def test_health_and_models(client):
    assert client.get("/health").json()["status"] == "ok"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["small"]
    assert client.get("/v1/models/small").json()["id"] == "small"
    assert client.get("/v1/models/other").status_code == 404


def test_upload_list_delete(client, scan, upload, tmp_path):
    about = upload(client, scan)
    assert about["name"] == "ball.nii.gz"
    assert about["shape"] == [20, 24, 12]
    assert about["spacing_mm"] == pytest.approx(nib.load(scan).header.get_zooms(), abs=1e-4)
    assert about["bytes"] == scan.stat().st_size
    raw = client.post(
        "/v1/volumes?name=raw", content=scan.read_bytes(), headers={"content-type": "application/octet-stream"}
    )
    assert raw.status_code == 201
    assert [v["name"] for v in client.get("/v1/volumes").json()["data"]] == ["ball.nii.gz", "raw"]
    assert client.get(f"/v1/volumes/{about['id']}").json()["shape"] == about["shape"]
    assert client.delete(f"/v1/volumes/{about['id']}").json()["deleted"] is True
    assert client.get(f"/v1/volumes/{about['id']}").status_code == 404
    assert client.post(f"/v1/volumes/{about['id']}/report").status_code == 404
    assert not (tmp_path / "data" / about["id"]).exists()


def test_mask_by_click_equals_the_engines(client, scan, upload, engine):
    volume = upload(client, scan)["id"]
    click = {"points": [[10, 12, 6, 1]]}
    mask = client.post(f"/v1/volumes/{volume}/segment", json=click).json()
    found = engine.open(scan).segment(points=[(10, 12, 6, 1)])
    expected = found.volume.to_source(found.mask)
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(decoded(mask["rle"]), expected)
    assert mask["box"] == bounds(expected)
    assert mask["volume_ml"] == pytest.approx(found.volume_ml, abs=1e-3)
    as_file = client.post(f"/v1/volumes/{volume}/segment", json={**click, "format": "nifti"})
    again = client.get(f"/v1/volumes/{volume}/masks/{as_file.headers['x-mask-id']}")
    for content in (as_file.content, again.content):
        image = nifti(content)
        np.testing.assert_array_equal(np.asarray(image.dataobj) > 0, expected)
        np.testing.assert_allclose(image.affine, nib.load(scan).affine, atol=1e-5)


def test_refining_goes_on_from_the_mask_or_asks_with_all_clicks(client, scan, upload, engine):
    volume = upload(client, scan)["id"]
    url = f"/v1/volumes/{volume}/segment"
    first = client.post(url, json={"points": [[10, 12, 6]], "box": [2, 2, 2, 17, 21, 9]}).json()
    refined = client.post(url, json={"mask_id": first["id"], "points": [[3, 3, 6, -1]]}).json()
    session = engine.open(scan)
    found = session.segment(points=[(10, 12, 6)], box=(2, 2, 2, 17, 21, 9))
    own = session.refine(found, [(3, 3, 6, -1)])
    np.testing.assert_array_equal(decoded(refined["rle"]), own.volume.to_source(own.mask))
    assert refined["rle"] != first["rle"]
    at_once = client.post(url, json={"points": [[10, 12, 6], [3, 3, 6, -1]], "box": [2, 2, 2, 17, 21, 9]}).json()
    engine.forget()
    again = client.post(url, json={"mask_id": first["id"], "points": [[3, 3, 6, -1]]}).json()
    assert again["rle"] == at_once["rle"] != refined["rle"]
    assert client.post(url, json={"mask_id": first["id"], "points": [[1, 1, 1]], "space": "ras"}).status_code == 400
    assert client.post(url, json={"mask_id": "mask_none", "points": [[1, 1, 1]]}).status_code == 404


def test_mask_by_text_and_report_equal_the_engines(client, scan, upload, engine):
    volume = upload(client, scan)["id"]
    mask = client.post(f"/v1/volumes/{volume}/segment", json={"target": "liver"}).json()
    found = engine.open(scan).segment("liver")
    assert (mask["absent"], mask["text"]) == (found.absent, found.text)
    np.testing.assert_array_equal(decoded(mask["rle"]), found.volume.to_source(found.mask))
    report = client.post(f"/v1/volumes/{volume}/report", json={"max_tokens": 20}).json()
    assert report["text"] == engine.open(scan).report(max_tokens=20).text
    assert report["tokens"] <= 20


def test_several_masks_of_one_request_are_those_asked_for_one_by_one(client, scan, upload, engine):
    url = f"/v1/volumes/{upload(client, scan)['id']}"
    names = ["liver", "left kidney", "aorta"]
    answer = client.post(f"{url}/segment", json={"targets": names}).json()
    assert [mask["name"] for mask in answer["data"]] == names
    for name, mask in zip(names, answer["data"]):
        alone = client.post(f"{url}/segment", json={"target": name}).json()
        assert {**mask, "id": 0} == {**alone, "id": 0}
        assert client.get(f"{url}/masks/{mask['id']}").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"target": ""},
        {"points": []},
        {"points": [[1, 2]]},
        {"points": [[1e9, 0, 0]]},
        {"points": [[100, 2, 2]]},
        {"points": [[2, 2, 2, -1]]},
        {"box": [5, 5, 5, 1, 1, 1]},
        {"box": [1, 2, 3]},
        {"target": "liver", "space": "moon"},
        {"target": "liver", "surprise": 1},
        {"target": "word " * 3000},
        {"targets": []},
        {"targets": ["liver"], "points": [[10, 12, 6]]},
        {"targets": ["liver", ""]},
        {"targets": ["liver"], "format": "nifti"},
    ],
)
def test_segment_requests_that_make_no_sense(client, scan, upload, body):
    volume = upload(client, scan)["id"]
    answer = client.post(f"/v1/volumes/{volume}/segment", json=body)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]
    assert str(client.app.state.server.settings.data) not in answer.text


def say(monkeypatch, engine, text: str) -> None:
    """Make the model say a text with [SEG] in it."""
    ids = engine.chat.answer(text)[:-1]

    def said(prefix, prompts, *, max_tokens, cancel=None):
        for token in ids[: max_tokens[0]]:
            yield [Step(token, torch.ones(64) if token == engine.chat.seg_id else None)]

    monkeypatch.setattr(engine.language, "generate_all", said)


@pytest.fixture
def online(make_app, serving):
    with serving(make_app()) as url:
        yield url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_official_client(online, scan, engine, monkeypatch):
    url, client = online
    with httpx.Client(base_url=url) as http, scan.open("rb") as stream:
        volume = http.post("/v1/volumes", files={"file": stream}).json()["id"]
    question = [{"role": "user", "content": "What is seen?"}]
    options = {"model": client.models.list().data[0].id, "extra_body": {"volume_id": volume}}
    whole = client.chat.completions.create(messages=question, max_tokens=12, **options)
    expected = engine.open(scan).ask("What is seen?", max_tokens=12)
    assert whole.choices[0].message.content.strip() == expected.text
    assert whole.usage.completion_tokens == expected.tokens
    assert whole.choices[0].finish_reason == ("length" if expected.tokens == 12 else "stop")
    session = engine.open(scan)
    assert whole.usage.prompt_tokens == session.prefix_tokens + len(engine.chat.question("What is seen?"))

    stream = client.chat.completions.create(
        messages=question, max_tokens=12, stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text.strip() == expected.text
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason

    say(monkeypatch, engine, "Liver: [SEG]. Spleen: [SEG].")
    history = [*question, {"role": "assistant", "content": "A ball."}, {"role": "user", "content": "Segment it."}]
    answer = client.chat.completions.create(messages=history, **options).choices[0].message
    assert [mask["name"] for mask in answer.segmentations] == ["liver", "spleen"]
    deltas = [c.choices[0].delta for c in client.chat.completions.create(messages=history, stream=True, **options)]
    masks = [delta.segmentation for delta in deltas if getattr(delta, "segmentation", None)]
    assert [mask["rle"] for mask in masks] == [mask["rle"] for mask in answer.segmentations]
    first = next(i for i, delta in enumerate(deltas) if getattr(delta, "segmentation", None))
    assert any(delta.content for delta in deltas[1:first]) and any(delta.content for delta in deltas[first:])


def test_official_client_gets_reasons(online):
    _, client = online
    question = [{"role": "user", "content": "Why?"}]
    with pytest.raises(openai.NotFoundError, match="upload it first"):
        client.chat.completions.create(model="small", messages=question, extra_body={"volume_id": "vol_none"})
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(model="gpt", messages=question, extra_body={"volume_id": "vol_none"})
    with pytest.raises(openai.UnprocessableEntityError, match="volume_id"):
        client.chat.completions.create(model="small", messages=question)
    turns = [*question, *question]
    with pytest.raises(openai.UnprocessableEntityError, match="in turn"):
        client.chat.completions.create(model="small", messages=turns, extra_body={"volume_id": "v"})


def test_too_long_question_is_an_error_before_the_stream(client, scan, upload):
    volume = upload(client, scan)["id"]
    body = {"model": "small", "volume_id": volume, "stream": True}
    answer = client.post(
        "/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": "word " * 3000}]}
    )
    assert answer.status_code == 400
    assert "shorten" in answer.json()["error"]["message"]


def test_metrics(client, scan, upload):
    volume = upload(client, scan)["id"]
    for _ in range(2):
        assert client.post(f"/v1/volumes/{volume}/report", json={"max_tokens": 5}).status_code == 200
    client.get("/made/up/path")
    text = client.get("/metrics").text
    assert 'medvl_sam2_requests_total{route="/v1/volumes/{volume_id}/report",status="200"} 2.0' in text
    assert 'medvl_sam2_scan_cache_total{found="no"} 1.0' in text
    assert 'medvl_sam2_scan_cache_total{found="yes"} 1.0' in text
    assert "medvl_sam2_tokens_total" in text and "medvl_sam2_volumes 1.0" in text
    assert "made/up" not in text


@pytest.mark.parametrize("flat", [[0, 0, 0], [1], [0, 1, 1, 0], [1, 1, 0, 1]])
def test_run_lengths(flat):
    counts = run_lengths(np.array(flat, bool))
    assert np.repeat(np.arange(len(counts)) % 2, counts).tolist() == flat
