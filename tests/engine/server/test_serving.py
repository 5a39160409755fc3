"""Many users at once, and all the ways in which a request may end early."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import nibabel as nib
import numpy as np
import pytest
from fastapi.testclient import TestClient

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.language.base import Step
from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.engine.server.auth import ApiKeys, check_host
from medvl_sam2.model.prompts import SEGMENT_ANSWER

KEYS = ["alice-has-a-long-key", "bob-has-another-long-key"]
NONE = "vol_" + "0" * 24
QUESTION = [{"role": "user", "content": "What is seen?"}]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


class Slow:
    """Stands in for generation: a token every `pause` seconds, until cancelled."""

    def __init__(self, engine, monkeypatch, pause: float = 0.02):
        self.tokens, self.cancelled, self.go = 0, 0, threading.Event()
        self.go.set()
        word = engine.chat.answer("the")[0]

        def said(prefix, prompts, *, max_tokens, cancel=None):
            (left,) = max_tokens
            try:
                while left and not cancel.is_set():
                    self.go.wait(30)
                    time.sleep(pause)
                    self.tokens += 1
                    left -= 1
                    yield [Step(word)]
            finally:
                self.cancelled += left > 0

        monkeypatch.setattr(engine.language, "generate_all", said)


def ask(url: str, volume: str, **options) -> httpx.Response:
    body = {"model": "small", "volume_id": volume, "messages": QUESTION, "max_tokens": 500, **options}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_keys(make_app, scan, upload):
    alice, bob = (bearer(key) for key in KEYS)
    with TestClient(make_app(KEYS)) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, bearer("wrong"), bearer(KEYS[0][:-1]), {"Authorization": KEYS[0]}, bearer("é" * 20)):
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            for path in ("/v1/models", "/v1/volumes", "/metrics"):
                answer = client.get(path, headers=encoded)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        volume = upload(client, scan, headers=alice)["id"]
        url = f"/v1/volumes/{volume}"
        mask = client.post(f"{url}/segment", json={"points": [[10, 12, 6]]}, headers=alice).json()["id"]
        body = {"model": "small", "volume_id": volume, "messages": QUESTION}
        requests = [
            ("GET", url, None),
            ("POST", f"{url}/segment", {"target": "liver"}),
            ("POST", f"{url}/report", None),
            ("GET", f"{url}/masks/{mask}", None),
            ("POST", "/v1/chat/completions", body),
            ("DELETE", url, None),
        ]
        for method, path, document in requests:
            answer = client.request(method, path, json=document, headers=bob)
            unknown = client.request(
                method,
                path.replace(volume, NONE),
                json=document and json.loads(json.dumps(document).replace(volume, NONE)),
                headers=bob,
            )
            assert answer.status_code == 404
            assert answer.text.replace(volume, NONE) == unknown.text, "nobody learns whose scan it is"
        assert client.get("/v1/volumes", headers=bob).json()["data"] == []
        assert client.get(url, headers=alice).status_code == 200


def test_keys_from_file_and_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDVL_SAM2_API_KEYS", raising=False)
    assert len(ApiKeys.load()) == 0
    (tmp_path / "keys").write_text(f"# ours\n{KEYS[0]}  # Alice\n\n")
    monkeypatch.setenv("MEDVL_SAM2_API_KEYS", KEYS[1])
    keys = ApiKeys.load(tmp_path / "keys")
    assert None not in {keys.owner(key) for key in KEYS} and keys.owner(KEYS[0]) != keys.owner(KEYS[1])
    assert keys.owner("") is None
    for content in ("# nothing\n", "short\n"):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(InputError, match="key"):
            ApiKeys.load(tmp_path / "bad")
    with pytest.raises(InputError, match="cannot be read"):
        ApiKeys.load(tmp_path / "absent")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_without_keys_loopback_only(host):
    with pytest.raises(InputError, match="API keys"):
        check_host(host, ApiKeys([]))
    check_host(host, ApiKeys(KEYS))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_no_key(host):
    check_host(host, ApiKeys([]))


def test_load_of_mixed_requests_loses_and_crosses_nothing(make_app, serving, upload, tmp_path):
    """32 at once, of two users with three scans each, give the answers that they give one by one."""
    scans = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (16, 18, 8 + seed)), indexing="ij"))
        voxels = np.where((grid**2).sum(0) < 0.3 + 0.1 * seed, 60, -1000) + rng.normal(0, 15, grid.shape[1:])
        nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.diag([2, 2, 3, 1])), tmp_path / f"{seed}.nii.gz")
        scans.append(tmp_path / f"{seed}.nii.gz")

    with serving(make_app(KEYS)) as url, httpx.Client(base_url=url, timeout=120) as http:
        owners = [bearer(KEYS[seed % 2]) for seed in range(6)]
        volumes = [upload(http, path, headers=owners[i])["id"] for i, path in enumerate(scans)]

        def send(number: int) -> object:
            which, kind = number % 6, number // 6
            volume, headers = volumes[which], owners[which]
            at = f"/v1/volumes/{volume}"
            chat = {"model": "small", "volume_id": volume, "messages": QUESTION, "max_tokens": 10}
            if kind == 0:
                answer = http.post("/v1/chat/completions", json=chat, headers=headers)
                return answer.status_code, answer.json()["choices"], answer.json()["usage"]
            if kind == 1:
                answer = http.post("/v1/chat/completions", json={**chat, "stream": True}, headers=headers)
                lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
                assert lines[-1] == "[DONE]"
                return answer.status_code, [json.loads(line)["choices"] for line in lines[:-1]]
            if kind == 2:
                answer = http.post(f"{at}/segment", json={"points": [[8, 9, 4]]}, headers=headers)
                return answer.status_code, answer.json()["rle"]
            if kind == 3:
                answer = http.post(f"{at}/segment", json={"target": "liver"}, headers=headers)
                return answer.status_code, answer.json()["rle"], answer.json()["text"]
            if kind == 4:
                answer = http.post(f"{at}/report", json={"max_tokens": 10}, headers=headers)
                return answer.status_code, answer.json()["text"]
            passing = upload(http, scans[which], headers=headers)
            shape = passing.pop("shape")
            return http.delete(f"/v1/volumes/{passing['id']}", headers=headers).status_code, shape

        alone = [send(number) for number in range(32)]
        with ThreadPoolExecutor(32) as pool:
            together = list(pool.map(send, range(32)))
        assert together == alone
        assert {answer[0] for answer in alone} == {200}
        assert len({json.dumps(answer[1]) for answer in alone[12:18]}) == 6, "scans differ, so crossing would show"


def test_full_queue_says_when_to_come_again(make_app, serving, scan, upload, engine, monkeypatch):
    slow = Slow(engine, monkeypatch)
    slow.go.clear()
    app = make_app(workers=1, waiting=1)
    with serving(app) as url, httpx.Client(base_url=url) as http, ThreadPoolExecutor(2) as pool:
        volume = upload(http, scan)["id"]
        held = [pool.submit(ask, url, volume, max_tokens=3) for _ in range(2)]
        until(lambda: "medvl_sam2_queue_waiting 1.0" in http.get("/metrics").text)
        refused = ask(url, volume)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert http.post("/v1/volumes", content=b"x").status_code == 429
        slow.go.set()
        assert [answer.result().status_code for answer in held] == [200, 200]
        assert ask(url, volume, max_tokens=3).status_code == 200
        assert "medvl_sam2_queue_rejected_total 2.0" in http.get("/metrics").text


def test_time_limit(make_app, serving, scan, upload, engine, monkeypatch):
    app = make_app(workers=1, timeout=3.0)
    with serving(app) as url, httpx.Client(base_url=url) as http:
        volume = upload(http, scan)["id"]
        # The scan's own work is done before the clock of this test runs.
        assert http.post(f"/v1/volumes/{volume}/report", json={"max_tokens": 1}, timeout=60).status_code == 200
        slow = Slow(engine, monkeypatch)
        late = ask(url, volume)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        streamed = ask(url, volume, stream=True)
        events = [line[6:] for line in streamed.text.splitlines() if line]
        assert json.loads(events[-2])["error"]["code"] == "timeout"
        assert events[-1] == "[DONE]"
        until(lambda: slow.cancelled == 2)
        until(lambda: "medvl_sam2_queue_running 0.0" in http.get("/metrics").text)


def test_client_killed_in_mid_stream(make_app, serving, scan, upload, engine, monkeypatch):
    slow = Slow(engine, monkeypatch, pause=0.05)
    script = (
        "import httpx, sys\n"
        "body = {'model': 'small', 'volume_id': sys.argv[2], 'stream': True, 'max_tokens': 500,\n"
        "        'messages': [{'role': 'user', 'content': 'What is seen?'}]}\n"
        "with httpx.stream('POST', sys.argv[1] + '/v1/chat/completions', json=body, timeout=60) as answer:\n"
        "    for line in answer.iter_lines():\n"
        "        print(line, flush=True)\n"
    )
    with serving(make_app(workers=1)) as url, httpx.Client(base_url=url) as http:
        volume = upload(http, scan)["id"]
        client = subprocess.Popen([sys.executable, "-c", script, url, volume], stdout=subprocess.PIPE, text=True)
        seen = 0
        while seen < 5:
            seen += '"content": " ' in client.stdout.readline() or slow.tokens >= 5
        client.kill()
        client.wait()
        until(lambda: slow.cancelled == 1)
        assert slow.tokens < 400
        until(lambda: "medvl_sam2_queue_running 0.0" in http.get("/metrics").text)
        assert ask(url, volume, max_tokens=3).status_code == 200


def test_client_that_hangs_up_while_it_waits(make_app, serving, scan, upload, engine, monkeypatch):
    slow = Slow(engine, monkeypatch)
    with serving(make_app(workers=1)) as url, httpx.Client(base_url=url) as http:
        volume = upload(http, scan)["id"]
        body = {"model": "small", "volume_id": volume, "messages": QUESTION, "max_tokens": 500}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=httpx.Timeout(60, read=1))
        until(lambda: slow.cancelled == 1)
        assert slow.tokens < 400


@pytest.mark.parametrize("body", [{"points": [[10, 12, 6]]}, {"targets": ["liver", "spleen"]}], ids=["one", "several"])
def test_client_that_hangs_up_while_its_masks_are_made(make_app, serving, scan, upload, engine, monkeypatch, body):
    """The work ends before the next slice, and the scan is as it was."""
    held, started, gone, step, done = threading.Event(), threading.Event(), threading.Event(), SliceRunner.step, []

    def stepped(self, *args):
        done.append(1)
        if held.is_set():
            started.set()
            assert gone.wait(60)
        return step(self, *args)

    forced, first = engine.language.forced, engine.chat.answer(SEGMENT_ANSWER)[0]
    monkeypatch.setattr(engine.language, "forced", lambda *a: [replace(r, margin=1.0, first=first) for r in forced(*a)])
    monkeypatch.setattr(SliceRunner, "step", stepped)
    app = make_app(workers=1)
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as http:
        at = f"/v1/volumes/{upload(http, scan)['id']}/segment"
        before = http.post(at, json=body).json()
        assert len(done) >= 8
        done.clear()
        held.set()
        content = json.dumps(body)
        head = (
            f"POST {at} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        )
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port)) as line:
            line.sendall(f"{head}\r\n\r\n{content}".encode())
            assert started.wait(60)
        queue = app.state.server.queue
        until(lambda: any(cancel.is_set() for cancel in list(queue._cancels)))
        gone.set()
        until(lambda: "medvl_sam2_queue_running 0.0" in http.get("/metrics").text)
        assert len(done) == 1
        held.clear()
        after = http.post(at, json=body).json()
        masks = [answer.get("data", [answer]) for answer in (before, after)]
        assert [mask["rle"] for mask in masks[0]] == [mask["rle"] for mask in masks[1]]


def test_shutdown_finishes_what_runs(make_app, serving, scan, upload, engine, monkeypatch):
    slow = Slow(engine, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        with serving(make_app()) as url:
            with httpx.Client(base_url=url) as http:
                volume = upload(http, scan)["id"]
            running = pool.submit(ask, url, volume, max_tokens=60)
            until(lambda: slow.tokens > 3)
        answer = running.result()
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 60
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_restart_serves_the_scans_again(make_app, scan, upload, tmp_path):
    click = {"points": [[10, 12, 6]]}
    with TestClient(make_app(KEYS)) as client:
        about = upload(client, scan, headers=bearer(KEYS[0]))
        url = f"/v1/volumes/{about['id']}"
        mask = client.post(f"{url}/segment", json=click, headers=bearer(KEYS[0])).json()
    half = tmp_path / "data" / "vol_half"
    half.mkdir()
    (half / "scan").write_bytes(b"half of an upload")
    os.utime(half, (0, 0))
    app = make_app(KEYS)
    with TestClient(app) as client:
        again = client.get(url, headers=bearer(KEYS[0])).json()
        assert {**again, "created": 0, "expires": 0} == {**about, "created": 0, "expires": 0}
        assert client.get(url, headers=bearer(KEYS[1])).status_code == 404
        assert client.post(f"{url}/segment", json=click, headers=bearer(KEYS[0])).json()["rle"] == mask["rle"]
        more = {"mask_id": mask["id"], "points": [[3, 3, 6, -1]]}
        assert client.post(f"{url}/segment", json=more, headers=bearer(KEYS[0])).status_code == 200
        app.state.server.store.expire()
        assert not half.exists()
        assert client.get(url, headers=bearer(KEYS[0])).status_code == 200


def test_servers_that_share_a_folder_know_the_same_scans(make_app, scan, upload):
    with TestClient(make_app()) as one, TestClient(make_app()) as other:
        volume = upload(one, scan)["id"]
        mask = one.post(f"/v1/volumes/{volume}/segment", json={"points": [[10, 12, 6]]}).json()
        content = [c.get(f"/v1/volumes/{volume}/masks/{mask['id']}").content for c in (one, other)]
        assert content[0] == content[1]
        assert other.delete(f"/v1/volumes/{volume}").status_code == 200
        assert one.post(f"/v1/volumes/{volume}/report").status_code == 404


def test_scans_expire_when_not_used(make_app, scan, upload, tmp_path):
    app = make_app(expire=1000.0)
    store = app.state.server.store

    def age(identity: str) -> None:
        then = time.time() - 2000
        os.utime(tmp_path / "data" / identity / "volume.json", (then, then))

    with TestClient(app) as client:
        old, used = upload(client, scan)["id"], upload(client, scan)["id"]
        age(old)
        age(used)
        assert client.post(f"/v1/volumes/{used}/report", json={"max_tokens": 1}).status_code == 200
        store.expire()
        assert [v["id"] for v in client.get("/v1/volumes").json()["data"]] == [used]
        assert client.post(f"/v1/volumes/{old}/report").status_code == 404
        assert not (tmp_path / "data" / old).exists()
        with store.using(store.get(used, "local")):
            age(used)
            store.expire()
        assert client.get(f"/v1/volumes/{used}").status_code == 200
        assert not store._users, "nothing is remembered of scans that nobody uses"
