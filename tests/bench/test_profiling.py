"""The profile: stages named in the trace, memory added up, and both as the command line writes them."""

import gzip
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from medvl_sam2 import _bench, cli
from medvl_sam2.bench import e2e, ingest, profiling, rows, scaling
from medvl_sam2.bench.e2e import made_up_scan
from medvl_sam2.engine.beside import Beside
from medvl_sam2.engine.engine import MedVLEngine


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_trace_names_the_stages_and_carries_the_memory(small_model, tmp_path, in_a_thread):
    engine = MedVLEngine.from_pretrained(small_model, device="cpu", dtype="float32")
    if in_a_thread:
        # As on CUDA, where SAM2's work has a thread of its own.
        nothing = {"leave": lambda tensors: None, "mark": lambda: None, "take": lambda tensors, mark: None}
        engine.beside = Beside(SimpleNamespace(inside=lambda mark: nullcontext(), **nothing))
    found = profiling.run(engine, made_up_scan(1, 32), tmp_path, tokens=1)
    trace = json.loads(gzip.decompress(found["trace"].read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    stages = {"vision", "prefix", "language", "slices", "masks", "voxels"}
    assert {f"medvl_sam2.{stage}" for stage in stages} | {"mask, new scan", "answer", "allocated MB, cpu"} <= names
    assert stages <= set(found["seconds"])
    assert len(found["top"]) > 5 and found["top"][0]["ms"] >= found["top"][1]["ms"]
    assert found["top"][0]["name"][:40] in found["operations"].read_text()
    timeline = json.loads(found["memory"].read_text())
    assert found["peak_mb"]["cpu"] == max(mb for _, mb in timeline["allocated_mb"]["cpu"]) > 0
    assert stages <= {stage["name"] for stage in timeline["stages"]}
    assert not (tmp_path / "trace.json").exists()


def test_a_timeline_adds_allocations_up():
    def event(ts: float, size: int, device: int = 0) -> dict:
        about = {"Bytes": size, "Device Type": device, "Device Id": 0}
        return {"name": "[memory]", "ts": ts, "args": about}

    stage = {"ph": "X", "cat": "user_annotation", "name": "medvl_sam2.masks", "ts": 1_000.0, "dur": 2_000.0}
    events = [
        event(1_500, 2_000_000),
        event(1_600, 3_000_000),
        stage,
        event(1_700, -3_000_000),
        event(4_000, 1_000_000),
    ]
    found = profiling.memory_timeline([*events, event(1_100, 500_000, device=1)])
    assert found["allocated_mb"] == {"cpu": [(0, 5.0), (3, 3.0)], "cuda:0": [(0, 0.5)]}
    assert found["stages"] == [{"name": "masks", "start_ms": 0.0, "end_ms": 2.0}]


def test_the_verb_writes_rows_as_table_json_and_csv(monkeypatch, tmp_path, capsys):
    run = ingest.run
    monkeypatch.setattr(ingest, "run", lambda **given: run(native=(20, 32, 32), grid=(4, 16, 16), **given))
    assert cli.main(["bench", "ingest", "--device", "cpu", "--json", "--out", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["part"] == "ingest" and document["problems"] == []
    assert [row["provider"] for row in document["rows"]] == ["whole volume", "ours"]
    assert (tmp_path / "ingest.csv").read_text().startswith("work,objects,provider")
    assert len(json.loads((tmp_path / "ingest.json").read_text())["rows"]) == 2


def test_a_wrong_result_fails_the_verb(monkeypatch, tmp_path):
    wrong = rows.judged("x", {"base": [1.0], "ours": [1.0]}, {"ours": rows.Check(False)})
    monkeypatch.setattr(ingest, "run", lambda **_: wrong)
    assert cli.main(["bench", "ingest", "--out", str(tmp_path)]) == 1


def test_a_result_that_is_no_number_fails_the_verb_and_is_told(monkeypatch, tmp_path, capsys):
    wrong = rows.judged("x", {"base": [1.0], "ours": [1.0]}, {"ours": rows.Check(False, math.nan)})
    monkeypatch.setattr(ingest, "run", lambda **_: wrong)
    assert cli.main(["bench", "ingest", "--json", "--out", str(tmp_path)]) == 1
    said = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)
    assert said["problems"] == ["x by ours"] and said["rows"][1]["error"] is None
    assert json.loads((tmp_path / "ingest.json").read_text(), parse_constant=pytest.fail)["rows"] == said["rows"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["ingest", "--rounds", "4"], "5 or more"),
        (["segmenter", "--preset", "tiny"], "1b-fast"),
        (["e2e", "--slices", "1"], "2 or more"),
        (["ingest", "--device", "toaster"], "device: expected auto, cpu"),
        (["ingest", "--device", "meta"], "expected auto, cpu or cuda"),
        (["e2e", "--objects", "0"], "1 or more"),
    ],
)
def test_wrong_options_are_told(options, words, capsys, tmp_path):
    assert cli.main(["bench", *options, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_the_parts_of_a_request_go_to_files_and_charts(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    asked = {}
    found = rows.judged("x", {"base": [2.0], "ours": [1.0]}, {"ours": rows.Check(True)}, floor=0.5, objects=1)
    stage = {"work": "x", "objects": 1, "stage": "vision", "seconds": 0.5, "floor_seconds": 0.1, "over_floor": 5.0}
    points = [{"work": "x", "axis": "slices", "x": n, "seconds": n, "per_second": None} for n in (1, 2)]
    fit = {"work": "x", "axis": "slices", **scaling.fitted([1, 2], [1.0, 2.0])}
    monkeypatch.setattr(e2e, "build", lambda config, slices, place: asked.update(name=config.name, slices=slices))
    monkeypatch.setattr(e2e, "measure", lambda _, **given: asked.update(given) or {"rows": found, "stages": [stage]})
    monkeypatch.setattr(scaling, "run", lambda _, rounds: asked.update(scaled=rounds) or (points, [fit]))
    options = ["--device", "cpu", "--slices", "16", "--objects", "1", "8", "--works", "masks", "scaling"]
    out = tmp_path / "out"
    assert cli.main(["bench", "e2e", *options, "--plot", str(tmp_path / "charts"), "--out", str(out), "--json"]) == 0
    assert asked == {"name": "1b-fast", "slices": 16, "objects": [1, 8], "tokens": 0, "rounds": 5, "scaled": 5}
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["rows"][1]["ratio"] == 2.0 and document["fits"][0]["slope"] == 1.0
    names = {"e2e.csv", "e2e_stages.csv", "e2e_scaling.csv", "e2e_fits.csv", "e2e.json"}
    assert {path.name for path in out.iterdir()} == names
    assert {path.name for path in (tmp_path / "charts").iterdir()} == {"e2e.png", "waterfall.png", "scaling.png"}


def test_all_parts_run_one_after_the_other(monkeypatch, tmp_path, capsys):
    commands = []
    (tmp_path / "encoder.json").write_text('{"part": "encoder", "rows": ["of an earlier run"]}')

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command[4:])
        if command[4] != "encoder":
            (tmp_path / f"{command[4]}.json").write_text(json.dumps({"part": command[4], "rows": [{"ratio": 2.0}]}))
        return SimpleNamespace(returncode=int("encoder" in command))

    monkeypatch.setattr(_bench.subprocess, "run", run)
    assert (
        cli.main(
            ["bench", "all", "--slices", "16", "--tokens", "64", "--device", "cpu", "--json", "--out", str(tmp_path)]
        )
        == 1
    )
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(document["parts"]) == [part for part in _bench.PARTS if part != "encoder"]
    assert document["parts"]["e2e"]["rows"] == [{"ratio": 2.0}] and document["problems"] == ["encoder"]
    assert [command[0] for command in commands] == list(_bench.PARTS)
    assert all("--tokens" in command and "--out" in command for command in commands)
    assert [command[0] for command in commands if "--slices" not in command] == ["memory"]
    for command in commands:
        args = cli.parser().parse_args(["bench", *command])
        assert args.tokens == 64 and args.device == "cpu"
