"""The measurement itself: every case is right, a wrong provider gets no ratio, tiles are searched and kept."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from medvl_sam2 import cli
from medvl_sam2.bench import kernels, operations, tuning
from medvl_sam2.kernels._tuning import config_path, tile, write_tuned


@pytest.mark.parametrize("name", operations.OPERATIONS)
def test_every_rival_computes_the_same(name):
    torch.manual_seed(0)
    for case in operations.cases(name, small=True, device=torch.device("cpu"), dtype=torch.float32):
        for row in kernels._measure(case, "forward", ("ours", "eager", "library"), torch.device("cpu"), 0.0):
            assert row["correct"], row
        assert case.bytes > 0 and case.flops >= 0 and case.operation == name


def test_rows_say_all_that_a_time_depends_on(tmp_path):
    rows = kernels.run(["segmentation_loss"], modes=("forward", "full"), dtypes=["float32"], small=True, seconds=0.0)
    assert [(row["mode"], row["provider"]) for row in rows] == [
        *(("forward", provider) for provider in ("eager", "ours")),
        *(("full", provider) for provider in ("eager", "ours")),
    ]
    for row in rows:
        assert set(row) <= set(kernels.COLUMNS)
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["torch"] == torch.__version__
        assert row["path"] == (
            "reference" if row["provider"] == "ours" and not torch.cuda.is_available() else row["path"]
        )
    assert rows[0]["ratio_to_eager"] == 1.0
    path = kernels.write_csv(rows[:2], tmp_path / "sub" / "rows.csv")
    kernels.write_csv(rows[2:], path)
    with path.open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows) and tuple(read[0]) == kernels.COLUMNS
    assert float(read[1]["p50_ms"]) == pytest.approx(rows[1]["p50_ms"], rel=1e-5)
    assert "ours" in kernels.table(rows)


@pytest.mark.parametrize("mode", ["forward", "full"])
def test_a_wrong_result_gets_no_ratio(mode):
    (case,) = operations.cases("segmentation_loss", small=True, device=torch.device("cpu"), dtype=torch.float32)
    wrong = replace(case, ours=lambda logits, wanted: case.eager(logits * 1.001, wanted))
    rows = kernels._measure(wrong, mode, ("ours", "eager"), torch.device("cpu"), 0.0)
    by_name = {row["provider"]: row for row in rows}
    assert by_name["eager"]["correct"] and not by_name["ours"]["correct"]
    assert by_name["ours"]["ratio_to_eager"] is None and "WRONG" in kernels.table(
        [{**r, "dtype": "", "gpu": ""} for r in rows]
    )


def test_not_a_number_is_wrong():
    assert kernels.difference(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"operations": ["nothing"]}, "an operation of"),
        ({"dtypes": ["float8"]}, "a dtype of"),
        ({"modes": ["backward"]}, "a mode of"),
        ({"providers": ["cudnn"]}, "a provider of"),
    ],
)
def test_unknown_names_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        kernels.run(**options)


def test_the_search_walks_to_the_fastest_tile_of_its_shape_class_alone():
    used = []

    def launch():
        used.append(tile("toy", {"BLOCK": 16, "num_warps": 4}, key="a"))
        assert tile("toy", {"BLOCK": 16, "num_warps": 4}, key="b") == {"BLOCK": 16, "num_warps": 4}

    def measure(run_once):
        run_once()
        if used[-1]["BLOCK"] > 64:
            raise ValueError("too large")
        return 1.0 / used[-1]["BLOCK"] + abs(used[-1]["num_warps"] - 2)

    row = tuning._search("toy", "a", {"BLOCK": 16, "num_warps": 4}, launch, measure, rounds=5)
    assert row["tile"] == {"BLOCK": 64, "num_warps": 2}
    assert row["heuristic_ms"] == pytest.approx(2 + 1 / 16) and row["tuned_ms"] == pytest.approx(1 / 64)


def test_tuned_tiles_are_kept_beside_the_others(tmp_path):
    write_tuned("Some GPU", "toy", {"BLOCK": 64}, "a", tmp_path)
    write_tuned("Some GPU", "toy", {"BLOCK": 32}, "b", tmp_path)
    document = json.loads(config_path("Some GPU", tmp_path).read_text())
    assert document == {"gpu": "Some GPU", "kernels": {"toy": {"a": {"BLOCK": 64}, "b": {"BLOCK": 32}}}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_needs_a_gpu():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        tuning.tune(["mixer"])


def test_a_heuristic_that_does_not_run_loses_and_the_table_says_what_was_kept():
    def measure(run_once):
        run_once()
        if blocks[-1] > 16:
            raise ValueError("too large")
        return float(blocks[-1])

    blocks = []
    row = tuning._search(
        "toy", "a", {"BLOCK": 32}, lambda: blocks.append(tile("toy", {"BLOCK": 32}, key="a")["BLOCK"]), measure, 2
    )
    assert row["heuristic_ms"] == float("inf") and row["tile"] == {"BLOCK": 8}
    text = tuning.table([{**row, "file": "x.json"}, row])
    assert "BLOCK 8" in text.splitlines()[1] and "as it was" in text.splitlines()[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_verb_says_that_tuning_needs_a_gpu(capsys):
    assert cli.main(["bench", "kernels", "--tune"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "bench kernels --tune: needs an NVIDIA GPU" in said
    assert cli.main(["bench", "ingest", "--tune"]) == 2
    assert "bench kernels --tune" in capsys.readouterr().err


def test_the_verb_measures_the_operations_asked_for(tmp_path, capsys):
    options = ["--operations", "layer_norm", "--json", "--out", str(tmp_path)]
    assert cli.main(["bench", "kernels", *options]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["operation"] for row in rows} == {"layer_norm"}
    assert cli.main(["bench", "kernels", "--operations", "nonsense"]) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_rows_are_right_and_tuning_keeps_them_so(tmp_path):
    rows = kernels.run(["segmentation_loss", "layer_norm"], small=True, modes=("forward", "full"))
    assert all(row["correct"] for row in rows) and any(row["path"] == "triton" for row in rows)
    found = tuning.tune(["segmentation_loss"], folder=tmp_path, rounds=1)
    assert all(row["tuned_ms"] <= row["heuristic_ms"] for row in found)
