"""`medvl-sam2 serve` as a process: killed, started again, told to stop."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from medvl_sam2.cli import main

ROOT = Path(__file__).resolve().parents[3]
KEY = "a-key-of-sixteen-characters"


def start(model: Path, data: Path, keys: Path) -> tuple[subprocess.Popen, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "medvl_sam2.cli", "serve", "--model", str(model), "--device", "cpu"]
    command += ["--port", str(port), "--data", str(data), "--keys", str(keys)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            httpx.get(f"{url}/health").raise_for_status()
            return process, url
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(process.stderr.read())


def test_killed_and_started_again(small_model, scan, tmp_path):
    keys, data = tmp_path / "keys", tmp_path / "data"
    keys.write_text(f"{KEY}\n")
    headers = {"Authorization": f"Bearer {KEY}"}
    process, url = start(small_model, data, keys)
    try:
        assert httpx.get(f"{url}/v1/volumes").status_code == 401
        with scan.open("rb") as stream:
            about = httpx.post(f"{url}/v1/volumes", files={"file": stream}, headers=headers, timeout=60).json()
    finally:
        process.kill()
        process.wait()
    process, url = start(small_model, data, keys)
    try:
        held = httpx.get(f"{url}/v1/volumes", headers=headers).json()["data"]
        assert [volume["id"] for volume in held] == [about["id"]]
        answer = httpx.post(f"{url}/v1/volumes/{about['id']}/report", headers=headers, timeout=60)
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        out, log = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, "Stopped.")
        assert KEY not in log and "Traceback" not in log
    finally:
        process.kill()


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--host", "0.0.0.0"], "keys"),
        (["--port", "99999"], "port"),
        (["--workers", "0"], "workers"),
        (["--keys", "/nowhere/keys"], "keys"),
        (["--ray"], "--data"),
    ],
)
def test_arguments_that_make_no_sense(arguments, word, capsys, monkeypatch):
    monkeypatch.delenv("MEDVL_SAM2_API_KEYS", raising=False)
    assert main(["serve", "--model", "no-such-model", *arguments]) == 2
    assert word in capsys.readouterr().err
