"""Traces requests: a timeline for Perfetto, the operations that take longest, and the memory over time."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.geometry import Volume
from medvl_sam2.engine.session import VolumeSession
from medvl_sam2.engine.timing import Stages

TRACE, OPERATIONS, MEMORY = "trace.json.gz", "operations.txt", "memory.json"
_PREFIX = "medvl_sam2."


class MarkedStages(Stages):
    """Stages that are ranges in NVIDIA's tools as well."""

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Mark the block and add its time to stage `name`."""
        if self._device.type != "cuda":
            with super().measure(name):
                yield
            return
        with torch.cuda.nvtx.range(_PREFIX + name), super().measure(name):
            yield


def run(
    engine: MedVLEngine, volume: Volume, out: Path, *, target: str = "liver", tokens: int = 16, rows: int = 25
) -> dict[str, Any]:
    """Trace a mask request on a new scan, a second one on the scan as it is known then, and an answer in text.

    All three are run once before, so that nothing is traced that happens only the first time.

    Args:
        engine: Runs the model.
        volume: The scan; the mask is asked for by name and by a point in its middle.
        out: Folder for the three files, which must exist.
        target: Name of the object.
        tokens: Length limit of the answer.
        rows: Operations in the table.

    Returns:
        Paths of the files, seconds per stage (the profiler's own time included), the operations, the peak of memory.
    """
    _requests(engine.open(volume), target, tokens)
    activities = [ProfilerActivity.CPU]
    on_cuda = engine.device.type == "cuda"
    if on_cuda:
        activities.append(ProfilerActivity.CUDA)
    # Each side keeps its stream; their launches take turns.
    alone = patch.object(engine, "beside", engine.beside.in_one_thread())
    with alone, profile(activities=activities, profile_memory=True) as profiler:
        session = engine.open(volume)
        session.stages = MarkedStages(engine.device)
        _requests(session, target, tokens)
    averages = profiler.key_averages()
    key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    (out / OPERATIONS).write_text(averages.table(sort_by=key, row_limit=rows, max_name_column_width=60))
    top = sorted((one for one in averages if not one.key.startswith(_PREFIX)), key=lambda one: -getattr(one, key))
    timeline = _export(profiler, out)
    return {
        "trace": out / TRACE,
        "operations": out / OPERATIONS,
        "memory": out / MEMORY,
        "seconds": {name: round(value, 4) for name, value in session.stages.items()},
        "top": [{"name": one.key, "calls": one.count, "ms": round(getattr(one, key) / 1e3, 3)} for one in top[:rows]],
        "peak_mb": {name: max(mb for _, mb in points) for name, points in timeline["allocated_mb"].items()},
    }


def _requests(session: VolumeSession, target: str, tokens: int) -> None:
    middle = tuple(n // 2 for n in reversed(session.volume.shape))
    for name in ("mask, new scan", "mask, known scan"):
        with record_function(name):
            found = session.segment(target, points=[middle])
            with session.stages.measure("voxels"):
                _ = found.mask
    with record_function("answer"):
        session.report(max_tokens=tokens)


def _export(profiler: profile, out: Path) -> dict[str, Any]:
    """Write trace and timeline; the trace gets the memory as a track of its own."""
    plain = out / "trace.json"
    profiler.export_chrome_trace(str(plain))
    trace = json.loads(plain.read_text())
    plain.unlink()
    events = trace["traceEvents"]
    timeline = memory_timeline(events)
    start = timeline["start_us"]
    for name, points in timeline["allocated_mb"].items():
        events += [
            {"ph": "C", "pid": 0, "name": f"allocated MB, {name}", "ts": start + 1e3 * ms, "args": {"MB": mb}}
            for ms, mb in points
        ]
    with gzip.open(out / TRACE, "wt") as file:
        json.dump(trace, file)
    (out / MEMORY).write_text(json.dumps(timeline) + "\n")
    return timeline


def memory_timeline(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Memory that PyTorch's allocators held, against time.

    Args:
        events: Of a Chrome trace made with `profile_memory`.

    Returns:
        "start_us": time 0 in the trace; "allocated_mb": by device (milliseconds, MB) at the peak of each millisecond,
        counted from what was held at the start; "stages": name, start and end in milliseconds.
    """
    held = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    stages = [e for e in events if e.get("ph") == "X" and str(e.get("name", "")).startswith(_PREFIX)]
    # A range shows on the CPU and again on the GPU's own track; the first is what the host meant.
    stages = [event for event in stages if event.get("cat") == "user_annotation"]
    start = min((event["ts"] for event in (*held, *stages)), default=0)
    tracks: dict[str, dict[int, float]] = {}
    now: dict[str, float] = {}
    for event in held:
        about = event["args"]
        device = "cpu" if about["Device Type"] == 0 else f"cuda:{about['Device Id']}"
        now[device] = now.get(device, 0.0) + about["Bytes"] / 1e6
        moment = int((event["ts"] - start) / 1e3)
        track = tracks.setdefault(device, {})
        track[moment] = max(track.get(moment, now[device]), now[device])
    return {
        "start_us": start,
        "allocated_mb": {name: [(ms, round(mb, 3)) for ms, mb in track.items()] for name, track in tracks.items()},
        "stages": [
            {
                "name": event["name"].removeprefix(_PREFIX),
                "start_ms": round((event["ts"] - start) / 1e3, 3),
                "end_ms": round((event["ts"] + event["dur"] - start) / 1e3, 3),
            }
            for event in sorted(stages, key=lambda event: event["ts"])
        ],
    }
