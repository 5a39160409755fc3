"""What stands in a row: ratios only beside a passed check, floors by closed forms, fits of known laws, CSV columns."""

import csv
import json
import math
import subprocess

import pytest
import torch

from medvl_sam2.bench import files, kernels, plots, rows, timing
from medvl_sam2.bench.compiling import add_where_possible, swapped
from medvl_sam2.bench.counting import CountedStages, count_flops
from medvl_sam2.kernels.attention import attention
from medvl_sam2.kernels.memory_attention import memory_attention_cached
from medvl_sam2.kernels.mixer import mixer_layer
from medvl_sam2.kernels.patch_embed3d import patch_embed3d
from medvl_sam2.kernels.window_attention import window_attention

SPENT = {"base": [4.0, 2.0, 3.0], "ours": [1.0, 1.5, 2.0]}
RIGHT = {"ours": rows.Check(True)}


def test_a_row_sets_medians_against_the_baseline_and_the_floor():
    base, ours = rows.judged("work", SPENT, {"ours": rows.Check(True, 1e-5, 0.9995)}, floor=0.5, rate="8 GFLOP/s")
    assert (base["seconds"], base["fastest"], base["slowest"], base["rounds"]) == (3.0, 2.0, 4.0, 3)
    assert base["ratio"] == 1.0 and ours["ratio"] == 2.0
    assert base["over_floor"] == 6.0 and ours["over_floor"] == 3.0 and ours["dice"] == 0.9995
    assert set(base) == set(ours) == set(rows.COLUMNS)
    assert ours["transformers"] and ours["peft"]
    assert ours["torch"] == torch.__version__ and ours["threads"] == torch.get_num_threads()
    assert "2.00" in rows.table([base, ours]) and "WRONG" not in rows.table([base, ours])


def test_a_failed_check_gets_no_ratio(caplog):
    _, ours = rows.judged("work", SPENT, {"ours": rows.Check(False, 0.2)})
    assert ours["ratio"] is None and ours["over_floor"] is None
    assert "wrong" in caplog.text and "WRONG" in rows.table([ours])


def test_a_side_without_a_check_does_not_count_as_right():
    with pytest.raises(ValueError, match="none of 'ours'"):
        rows.judged("work", SPENT, {"base": rows.Check(True)})


def test_nobody_is_measured_against_a_wrong_baseline():
    found = rows.judged("work", SPENT, {"base": rows.Check(False, 0.5), **RIGHT})
    assert [row["ratio"] for row in found] == [None, None] and [row["correct"] for row in found] == [False, True]


def _off(by: float) -> tuple[float, None]:
    return by, None


@pytest.mark.parametrize(
    ("exact", "base", "ours", "right"),
    [
        # By the baseline's own result: the fixed limit, and nothing else.
        (None, 0.0, 9e-4, (True, True)),
        (None, 0.0, 1.1e-3, (True, False)),
        # By float32: twice as far as the baseline, which has a limit too.
        ("exact", 0.02, 0.04, (True, True)),
        ("exact", 0.02, 0.042, (True, False)),
        ("exact", 0.3, 0.3, (False, True)),
        ("exact", math.nan, 0.0, (False, False)),
        ("exact", 0.02, math.nan, (True, False)),
        ("exact", 0.02, math.inf, (True, False)),
    ],
)
def test_sides_are_held_to_the_baseline_or_to_float32(exact, base, ours, right):
    checks = rows.checked({"base": base, "ours": ours}, lambda got, want: _off(got), exact)
    assert tuple(check.correct for check in checks.values()) == right


def test_masks_that_overlap_less_than_the_baselines_are_wrong():
    distance = lambda got, want: (0.0, got)  # noqa: E731
    for ours, right in ((0.88, True), (0.84, False)):
        assert rows.checked({"base": 0.95, "ours": ours}, distance, "exact")["ours"].correct == right
    assert not rows.checked({"base": 1.0, "ours": 0.99}, distance)["ours"].correct


def test_one_slice_turned_round_does_not_move_the_typical_error():
    want = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    got = 1.01 * want
    got[3, 1] = -want[3, 1]
    assert rows.typical_error(got, want) == pytest.approx(0.01, rel=1e-3) and rows.relative_error(got, want) > 0.3


@pytest.mark.parametrize(("factor", "ratio_is_given"), [(1 + 1e-4, True), (1 + 2e-3, False)])
def test_a_race_compares_before_it_times(factor, ratio_is_given, monkeypatch):
    monkeypatch.setattr(rows, "gemm_rate", lambda **_: 4e9)
    x = torch.randn(64)
    found = rows.race("x", {"plain": lambda: x, "scaled": lambda: factor * x}, flops=1e6, rounds=2)
    assert found[1]["error"] == pytest.approx(factor - 1, rel=1e-2)
    assert (found[1]["ratio"] is not None) == found[1]["correct"] == ratio_is_given
    assert found[0]["floor_seconds"] == pytest.approx(1e6 / 4e9) and found[0]["rate"] == "4 GFLOP/s"


def test_csv_files_have_the_columns(tmp_path):
    found = rows.judged("work", SPENT, RIGHT)
    path = files.append_csv(found[:1], tmp_path / "new" / "rows.csv")
    files.append_csv(found[1:], path)
    with path.open() as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == rows.COLUMNS and [row["provider"] for row in read] == ["base", "ours"]
    assert float(read[1]["ratio"]) == 2.0 and read[0]["dice"] == ""
    document = files.write_json({"rows": found}, tmp_path / "rows.json")
    assert json.loads(document.read_text())["rows"][1]["ratio"] == 2.0


def test_a_csv_file_of_an_older_version_gets_the_columns_it_lacks(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('work,old\r\n"a, b",1\r\n')
    files.append_csv([{"work": "c", "new": 2.0}], path)
    files.append_csv([{"work": "d"}], path)
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"work": "a, b", "old": "1", "new": ""},
            {"work": "c", "old": "", "new": "2"},
            {"work": "d", "old": "", "new": ""},
        ]
    assert [one.name for one in tmp_path.iterdir()] == ["rows.csv"]


def test_a_csv_file_that_is_no_table_is_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("work\r\na,b\r\n")
    with pytest.raises(ValueError, match="move it away"):
        files.append_csv([{"work": "c", "new": 1}], path)
    assert path.read_text() == "work\na,b\n"


def test_a_csv_file_whose_last_line_was_cut_off(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("work,seconds\r\na,1\r\nb,2")
    files.append_csv([{"work": "c", "seconds": 3}], path)
    assert list(csv.reader(path.read_text().splitlines()))[1:] == [["a", "1"], ["b", "2"], ["c", "3"]]
    path.write_text("work,seconds\r\na,1\r\nb")
    with pytest.raises(ValueError, match="move it away"):
        files.append_csv([{"work": "c", "seconds": 3}], path)


@pytest.mark.parametrize("name", ["segmenter", "memory", "e2e_stages", "e2e_scaling", "e2e_fits"])
def test_the_tables_of_the_repository_can_be_appended_to(name, tmp_path):
    old = files.RESULTS / f"{name}.csv"
    if not old.is_file():
        pytest.skip("no table there")
    path = tmp_path / old.name
    path.write_bytes(old.read_bytes())
    with path.open(newline="") as before:
        kept = list(csv.DictReader(before))
    files.append_csv(rows.judged("work", SPENT, RIGHT), path)
    with path.open(newline="") as after:
        found = list(csv.DictReader(after))
    assert len(found) == len(kept) + 2 and found[-1]["torch"] == torch.__version__
    assert all(new[key] == value for one, new in zip(kept, found) for key, value in one.items())


def test_an_error_that_is_no_number_still_makes_a_document(tmp_path):
    found = rows.judged("work", SPENT, {"ours": rows.Check(False, math.nan)}) + [
        {"over": math.inf, "by": (1.0, -math.inf)}
    ]
    path = files.write_json({"rows": found}, tmp_path / "rows.json")
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert document["rows"][1]["error"] is None and document["rows"][1]["correct"] is False
    assert document["rows"][2] == {"over": None, "by": [1.0, None]}
    written = files.append_csv(found[:2], tmp_path / "rows.csv").read_text()
    assert "nan" not in written and "WRONG" in rows.table(found[:2])


def test_the_commit_is_read_once_and_marked_where_files_differ(monkeypatch):
    asked = []

    def git(*arguments: str) -> str:
        asked.append(arguments)
        return "1454fc0" if "rev-parse" in arguments else " M bench/rows.py"

    monkeypatch.setattr(kernels, "_git", git)
    kernels.commit.cache_clear()
    try:
        assert [row["commit"] for row in rows.judged("work", SPENT, RIGHT)] == 2 * ["1454fc0+"]
        assert len(asked) == 2 and ":!bench/results" in asked[1]
        kernels.commit.cache_clear()
        monkeypatch.setattr(kernels, "_git", lambda *_: "1454fc0" if "rev-parse" in _ else "")
        assert kernels.commit() == "1454fc0"
        kernels.commit.cache_clear()
        monkeypatch.setattr(
            kernels, "_git", lambda *_: (_ for _ in ()).throw(subprocess.CalledProcessError(128, "git"))
        )
        assert kernels.commit() == ""
    finally:
        kernels.commit.cache_clear()


def test_fits_recover_a_line_and_a_power():
    x = [1, 2, 4, 8]
    line = timing.fit_line(x, [0.5 + 0.25 * n for n in x])
    assert (line.slope, line.intercept, line.r2) == pytest.approx((0.25, 0.5, 1.0))
    power = timing.fit_power(x, [3 * n**1.5 for n in x])
    assert (power.slope, power.r2) == pytest.approx((1.5, 1.0))
    # By hand: through (0, 0), (1, 1), (2, 0) the best line is flat and explains nothing.
    flat = timing.fit_line([0, 1, 2], [0, 1, 0])
    assert (flat.slope, flat.intercept, flat.r2) == pytest.approx((0, 1 / 3, 0))
    with pytest.raises(ValueError, match="two different x"):
        timing.fit_line([2, 2], [1, 2])


def test_what_the_compiler_refuses_is_left_out(caplog):
    def refused() -> None:
        raise RuntimeError("no compiler\nat all")

    sides = {"plain": lambda: 1}
    add_where_possible(sides, "refused", lambda: refused)
    add_where_possible(sides, "missing", refused)
    add_where_possible(sides, "taken", lambda: lambda: 2)
    assert list(sides) == ["plain", "taken"] and "refused is left out: no compiler" in caplog.text
    assert "missing is left out: no compiler" in caplog.text


def test_another_forward_lasts_for_its_block():
    module = torch.nn.Linear(2, 2)
    with swapped(module, lambda x: "other"):
        assert module(torch.ones(2)) == "other"
    assert module(torch.ones(2)).shape == (2,)


def test_sides_take_turns():
    order = []
    spent = timing.in_turns([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert order == list("ababab") and [len(one) for one in spent] == [3, 3]


def test_the_rates_are_those_of_the_machine():
    assert timing.copy_rate(8, 3) > 1e8
    assert timing.gemm_rate(256, 3) > 1e8


def test_operations_are_counted_by_their_closed_forms():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    assert count_flops(lambda: attention(q, k, k, backend="sdpa")) == 4 * 2 * 5 * 7 * 8
    # A causal product needs no more than the lower triangle.
    q = torch.randn(1, 2, 9, 8)
    assert count_flops(lambda: attention(q, q, q, causal=True, backend="sdpa")) == 4 * 2 * 8 * 9 * 10 // 2
    x, wide = torch.randn(3, 5, 8), torch.randn(3, 12, 8)
    narrow = torch.randn(3, 12, 4)
    assert count_flops(lambda: memory_attention_cached(x, wide, narrow, slot_size=6)) == 2 * 3 * 5 * 12 * (8 + 4)
    scan, weight = torch.randn(1, 4, 8, 8), torch.randn(6, 2 * 4 * 4)
    embed = lambda: patch_embed3d(scan, weight, torch.zeros(6), patch=(2, 4, 4))  # noqa: E731
    assert count_flops(embed) == 2 * (2 * 2 * 2) * 6 * 32
    qkv = torch.randn(1, 8, 8, 3 * 16)
    assert count_flops(lambda: window_attention(qkv, 2, 4)) == 4 * 64 * 16 * 16
    assert count_flops(lambda: window_attention(qkv, 2, 4, pool=True)) == 4 * 16 * 16 * 16


def test_the_mixers_products_are_counted():
    tokens, fewer, width, wider = 16, 4, 8, 20
    x = torch.randn(2, tokens, width)
    weights = [
        *(torch.ones(width), torch.zeros(width), torch.randn(fewer, tokens), torch.zeros(fewer)),
        *(torch.randn(fewer, fewer), torch.zeros(fewer), torch.ones(width), torch.zeros(width)),
        *(torch.randn(wider, width), torch.zeros(wider), torch.randn(wider, wider), torch.zeros(wider)),
    ]
    want = 2 * 2 * (fewer * (tokens + fewer) * width + fewer * wider * (width + wider))
    assert count_flops(lambda: mixer_layer(x, *weights)) == want


def test_stages_count_what_runs_in_them():
    stages = CountedStages(torch.device("cpu"))
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    for _ in range(2):
        with stages.measure("product"):
            a @ b
    with stages.measure("sum"):
        a.sum()
    assert stages.flops == {"product": 2 * 2 * 3 * 4 * 5, "sum": 0} and stages["product"] > 0


def test_charts_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = rows.judged("work", SPENT, {"ours": rows.Check(False)}, floor=0.5, objects=2)
    stage = {"work": "w", "objects": 2, "seconds": 0.5}
    stages = [{**stage, "stage": "vision", "floor_seconds": 0.1}, {**stage, "stage": "crop", "floor_seconds": None}]
    points = [{"axis": "slices", "x": n, "seconds": float(n)} for n in (1, 2)]
    fit = {"axis": "slices", "slope": 1.0, "intercept": 0.0, "r2": 1.0, "exponent": 1.0}
    peaks = [{"work": "w", "slices": 2, "objects": 1, "provider": side, "peak_mb": 2.0, "share": None} for side in "ab"]
    case = {"operation": "o", "shape": "s", "mode": "forward", "dtype": "float32", "provider": "ours", "p50_ms": 1.0}
    for path in (
        plots.memory(peaks, tmp_path / "memory.png"),
        plots.operations([{**case, "ratio_to_eager": 2.0, "floor_ms": 0.5}], tmp_path / "kernels.png"),
        plots.compared(found, tmp_path / "a" / "rows.png"),
        plots.waterfall(stages, tmp_path / "waterfall.png"),
        plots.scaling(points, [fit], tmp_path / "scaling.png"),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")
