"""Latency and throughput of the server under 32 mixed requests at once, beside the same requests one by one.

`python -m medvl_sam2.bench.serving --model tiny --scan ct.nii.gz` serves on a free port of this machine, checks that
both runs give the same answers, and prints one JSON document. Scans are encoded before the clock runs.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn

from medvl_sam2.engine.engine import LANGUAGE_BACKENDS, MedVLEngine
from medvl_sam2.engine.info import cpu_name
from medvl_sam2.engine.server.app import create_app
from medvl_sam2.engine.server.settings import ServerSettings

REQUESTS, TOKENS = 32, 48
KINDS = ("chat", "stream", "report", "text", "point", "refine", "chat", "text")


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--scan", type=Path, action="append", required=True, help="may be repeated")
    parser.add_argument("--language-backend", choices=LANGUAGE_BACKENDS, default="transformers")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", choices=sorted(set(KINDS)), default=KINDS, help="default: all, mixed")
    args = parser.parse_args(arguments)
    engine = MedVLEngine.from_pretrained(args.model, language_backend=args.language_backend)
    with tempfile.TemporaryDirectory() as folder:
        settings = ServerSettings(data=Path(folder), workers=args.workers, waiting=REQUESTS)
        server = uvicorn.Server(uvicorn.Config(create_app(engine, "m", settings), port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        document = asyncio.run(_measure(f"http://127.0.0.1:{port}", args.scan, args.kinds))
        server.should_exit = True
        thread.join()
    document |= {
        "model": args.model,
        "language_backend": args.language_backend,
        "workers": args.workers,
        "device": str(engine.device),
        "dtype": str(engine.precision),
        "torch": torch.__version__,
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
    }
    json.dump(document, sys.stdout)
    print()
    return 0


async def _measure(url: str, scans: list[Path], kinds: Sequence[str]) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        volumes = [await _prepare(http, scan) for scan in scans]
        jobs = [(kinds[i % len(kinds)], *volumes[i % len(volumes)]) for i in range(REQUESTS)]
        alone, alone_seconds = await _run(http, jobs, at_once=False)
        together, together_seconds = await _run(http, jobs, at_once=True)
    if [answer for _, answer in alone] != [answer for _, answer in together]:
        raise RuntimeError("answers differ between the two runs; nothing is reported")
    return {
        "requests": len(jobs),
        "one_by_one": _summary([seconds for seconds, _ in alone], alone_seconds),
        "at_once": _summary([seconds for seconds, _ in together], together_seconds),
        "alone_by_kind_ms": {
            kind: round(float(np.median([s for (k, *_), (s, _) in zip(jobs, alone) if k == kind]) * 1e3), 1)
            for kind in dict.fromkeys(kinds)
        },
    }


async def _prepare(http: httpx.AsyncClient, scan: Path) -> tuple[str, list[int], str]:
    """Upload a scan and have all its own work done; its id, a point in it, and a mask to refine."""
    answer = await http.post(
        "/v1/volumes", content=scan.read_bytes(), headers={"content-type": "application/octet-stream"}
    )
    answer.raise_for_status()
    about = answer.json()
    point = [n // 2 for n in about["shape"]]
    url = f"/v1/volumes/{about['id']}"
    (await http.post(f"{url}/report", json={"max_tokens": 1})).raise_for_status()
    mask = (await http.post(f"{url}/segment", json={"points": [point]})).json()["id"]
    return about["id"], point, mask


async def _run(http: httpx.AsyncClient, jobs: list[tuple], *, at_once: bool) -> tuple[list[tuple[float, Any]], float]:
    start = time.perf_counter()
    if at_once:
        results = await asyncio.gather(*(_send(http, *job) for job in jobs))
    else:
        results = [await _send(http, *job) for job in jobs]
    return results, time.perf_counter() - start


async def _send(http: httpx.AsyncClient, kind: str, volume: str, point: list[int], mask: str) -> tuple[float, Any]:
    """One request; its seconds and its answer."""
    start = time.perf_counter()
    url, body = f"/v1/volumes/{volume}/segment", {"target": "liver"}
    if kind in ("chat", "stream"):
        question = [{"role": "user", "content": "What is seen in the chest?"}]
        url = "/v1/chat/completions"
        body = {"model": "m", "volume_id": volume, "messages": question, "max_tokens": TOKENS}
        body["stream"] = kind == "stream"
    elif kind == "report":
        url, body = f"/v1/volumes/{volume}/report", {"max_tokens": TOKENS}
    elif kind == "point":
        body = {"points": [point]}
    elif kind == "refine":
        body = {"mask_id": mask, "points": [[0, 0, 0, -1]]}
    answer = await http.post(url, json=body)
    answer.raise_for_status()
    seconds = time.perf_counter() - start
    if kind == "stream":
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        return seconds, "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    document = answer.json()
    kept = document.get("choices") or document.get("rle") or document.get("text")
    return seconds, _without_ids(kept)


def _without_ids(document: Any) -> Any:
    """Ids of masks are new each time."""
    if isinstance(document, dict):
        return {key: _without_ids(value) for key, value in document.items() if key != "id"}
    if isinstance(document, list):
        return [_without_ids(value) for value in document]
    return document


def _summary(seconds: list[float], total: float) -> dict[str, float]:
    p50, p95 = np.percentile(seconds, [50, 95])
    return {
        "p50_ms": round(float(p50) * 1e3, 1),
        "p95_ms": round(float(p95) * 1e3, 1),
        "requests_per_s": round(len(seconds) / total, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
