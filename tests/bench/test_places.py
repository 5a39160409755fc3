"""Where the sides run: what a GPU would be asked for, and the path of all devices but the CPU, taken on the CPU."""

import importlib.util
from pathlib import Path

import pytest
import torch

from medvl_sam2.bench import e2e, encoder, language, memory, place, rows, segmenter, timing
from medvl_sam2.bench.place import CPU, Place
from medvl_sam2.model.config import LoRAConfig, VisionConfig, VolumeConfig
from medvl_sam2.model.language import LoRALinear

CUDA = torch.device("cuda", 1)
# Not the name that benchmarks know the CPU by, so that its results are held to those of another place.
ELSEWHERE = Place(torch.device("cpu", 0))
HALF = Place(torch.device("cpu"), torch.bfloat16)

_spec = importlib.util.spec_from_file_location("_requests", Path(__file__).with_name("test_requests.py"))
requests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(requests)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Floors are to be right, not the machine to be measured."""
    for module in (rows, segmenter):
        monkeypatch.setattr(module, "gemm_rate", lambda **_: 4e9)
    monkeypatch.setattr(language, "copy_rate", lambda **_: 2e9)


def test_the_cpu_computes_in_float32():
    assert Place.choose("cpu") == CPU and CPU.dtype_name == "float32"
    with CPU.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with HALF.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_a_gpu_computes_in_what_it_does_well(capability, dtype, monkeypatch):
    chosen = []
    monkeypatch.setattr(place, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert Place.choose() == Place(CUDA, dtype) and chosen == [CUDA]


def test_a_gpu_is_waited_for_round_every_run(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(str(device)))
    timing.in_turns([lambda: events.append("run")], 2, CUDA)
    assert events == 2 * ["cuda:1", "run", "cuda:1"]


def test_memory_of_a_gpu_is_what_is_allocated_there(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
    assert place.watched(lambda: events.append("run") or "found", CUDA) == ("found", 250)
    assert events == ["wait", "reset", "run", "wait"]


@pytest.mark.skipif(not place._CLEAR.exists(), reason="the system tells no peak")
def test_memory_of_the_cpu_is_what_is_resident():
    found, rise = place.watched(lambda: torch.ones(64 << 20, dtype=torch.uint8).sum(), CPU.device)
    assert found == 64 << 20 and 60e6 < rise < 1e9


def test_the_encoder_in_bfloat16_is_held_to_float32():
    config = VisionConfig(hidden_size=48, layers=2, heads=3, mlp_size=96)
    volume = VolumeConfig(size=(8, 32, 32), patch=(4, 8, 8))
    naive, ours = encoder.run(volume=volume, config=config, rounds=1, place=HALF)
    assert naive["correct"] and ours["correct"] and naive["dtype"] == ours["dtype"] == "bfloat16"
    assert naive["error"] > 1e-4 and ours["ratio"]


def test_tokens_in_bfloat16_are_ones_that_float32_might_say(monkeypatch):
    monkeypatch.setattr(language, "find_spec", lambda name: None)
    options = {"visual_tokens": 8, "tokens": 4, "rounds": 1}
    found = language.run(config=requests.shape(), lora=LoRAConfig(rank=4, alpha=8), place=HALF, **options)
    assert len(found) == 6 and all(row["correct"] and row["ratio"] and row["dtype"] == "bfloat16" for row in found)


def test_other_tokens_than_float32_might_say_are_wrong():
    config = requests.shape()
    chat = language.ChatTokens(language.shipped_tokenizer(), config.system, 8)
    exact = language.random_language(config, LoRAConfig(rank=4), chat)
    rows_of = language.prompt_rows(exact, chat, torch.randn(8, 64), chat.question(language.REPORT_REQUEST))
    best = language.generated(exact.peft, rows_of, 6).tokens
    assert language.regrets(exact, rows_of, best).abs().max() < 1e-5
    other = [*best[:5], (best[5] + 1) % 1024]
    checks = language.near_exact({"a": best, "b": other, "c": best[:5]}, exact, rows_of, 6)
    assert [check.correct for check in checks.values()] == [True, False, False]
    assert checks["b"].error == pytest.approx(1 / 6)


def test_baselines_run_pefts_own_layers(monkeypatch):
    def ours(*_: object) -> None:
        raise AssertionError("the model's own layer ran")

    monkeypatch.setattr(LoRALinear, "forward", ours)
    config = requests.shape()
    chat = language.ChatTokens(language.shipped_tokenizer(), config.system, 8)
    plain = language.random_language(config, LoRAConfig(rank=4), chat)
    sides = language.make_sides(plain, chat, torch.randn(8, 64), 2)
    assert len(sides[language.UNMERGED]().tokens) == 2


def test_requests_elsewhere_are_held_to_the_cpu():
    setting = e2e.build(requests.small(), slices=3, side=48, place=ELSEWHERE)
    assert setting.exact.exact is None and setting.exact.place == CPU
    found, stages = e2e.masks(setting, 1, (1e9, 1e9), 1)
    assert all(row["correct"] and row["ratio"] for row in found)
    known = found[2]
    assert known["over_new"] == pytest.approx(found[1]["seconds"] / known["seconds"])
    assert "a known scan" in rows.table(found) and found[0]["over_new"] is None
    assert {row["stage"]: row["floor_seconds"] for row in stages}["vision"] > 0
    answers = e2e.report(setting, 3, 1)
    assert all(row["correct"] for row in answers) and answers[2]["over_new"]


@pytest.fixture
def sam2():
    pytest.importorskip("sam2", reason="the sam2 package is not installed")
    pytest.importorskip("hydra", reason="hydra-core is not installed")


@pytest.mark.parametrize("where", [CPU, ELSEWHERE], ids=["cpu", "elsewhere"])
def test_the_segmenter_is_held_to_the_package(where, sam2):
    found = segmenter.run(variant="tiny", image_size=64, slices=3, objects=(2,), rounds=1, place=where)
    assert [row["provider"] for row in found] == [segmenter.PACKAGE, segmenter.OURS]
    assert all(row["correct"] and row["ratio"] and row["dice"] > 0.999 for row in found)


def test_the_predictor_for_whole_videos_has_the_same_weights(sam2, capsys):
    package, _ = segmenter.models("tiny", 64)
    whole = segmenter._whole_compiled("tiny", package, CPU)
    assert type(whole).__name__ == "SAM2VideoPredictorVOS" and not whole.training
    theirs = package.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in whole.state_dict().items())
    # The result's own stream stays free of what the package says about itself.
    assert capsys.readouterr().out == ""


def test_no_share_of_memory_without_equal_masks(sam2, monkeypatch):
    measured = {}
    monkeypatch.setattr(memory, "_measured", lambda side, *given: measured[side])
    one = torch.ones(2, 1, 4, 4).numpy()
    measured |= {segmenter.PACKAGE: (4_000_000, one), segmenter.OURS: (1_000_000, one)}
    options = {"slices": (2,), "objects": 1}
    package, ours = memory.run(**options)
    assert package["share"] == 1 and ours["share"] == 0.25 and ours["correct"] and ours["dice"] == 1
    measured[segmenter.OURS] = (1_000_000, -one)
    package, ours = memory.run(**options)
    assert ours["share"] is None and not ours["correct"] and "WRONG" in memory.table([package, ours])


@pytest.mark.skipif(not place._CLEAR.exists(), reason="the system tells no peak")
def test_both_sides_give_memory_and_masks(sam2):
    sides = [memory._rise(side, "tiny", 64, 2, 1, CPU) for side in (segmenter.PACKAGE, segmenter.OURS)]
    assert all(logits.shape == (2, 1, 16, 16) for _, logits in sides)
    error, dice = segmenter.distance(*(torch.from_numpy(logits) for _, logits in reversed(sides)))
    assert error < rows.MOST_ERROR and dice >= rows.LEAST_DICE
