"""The benchmarks of language and of whole requests at sizes of a second: both sides agree, and must."""

from dataclasses import replace

import pytest
import torch

from medvl_sam2.bench import e2e, encoder, ingest, language, rows, scaling
from medvl_sam2.bench.rows import COLUMNS
from medvl_sam2.model.config import LanguageConfig, LoRAConfig, MedVLConfig, SegConfig, VisionConfig
from medvl_sam2.model.presets import preset
from medvl_sam2.model.prompts import REPORT_REQUEST, SEGMENT_ANSWER, ChatTokens
from medvl_sam2.model.sam2 import SAM2Config

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}


def shape(**options: object) -> LanguageConfig:
    return LanguageConfig("qwen2", {**SHAPE, "tie_word_embeddings": False, **options}, seg_token_id=6)


def small(sam2: SAM2Config | None = None) -> MedVLConfig:
    tiny = preset("tiny")
    return replace(
        tiny,
        name="small",
        volume=replace(tiny.volume, size=(8, 32, 32), patch=(4, 8, 8)),
        vision=VisionConfig(hidden_size=48, layers=2, heads=3, mlp_size=96),
        projector=replace(tiny.projector, tokens=8),
        language=shape(),
        lora=LoRAConfig(rank=4, alpha=8, dropout=0.0),
        seg=SegConfig(),
        sam2=sam2 or SAM2Config.preset("micro", image_size=64),
    )


@pytest.fixture(scope="module")
def setting() -> e2e.Setting:
    return e2e.build(small(), slices=4, side=48)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Floors are to be right, not the machine to be measured."""
    for module in (rows, e2e):
        monkeypatch.setattr(module, "gemm_rate", lambda **_: 4e9)
    for module in (language, e2e):
        monkeypatch.setattr(module, "copy_rate", lambda **_: 2e9)


def test_ingest_and_encoder_agree_with_their_plain_forms():
    for found in (
        ingest.run(native=(20, 32, 32), grid=(4, 16, 16), rounds=1),
        encoder.run(volume=small().volume, config=small().vision, rounds=1),
    ):
        assert all(row["correct"] and set(row) == set(COLUMNS) for row in found)
    # Two blocks on 32 patches and the class token, products of 4 x 8 x 8 voxels, by hand.
    tokens, width = 33, 48
    block = 2 * tokens * (4 * width**2 + 2 * width * 96) + 4 * tokens**2 * width
    flops = 2 * block + 2 * 32 * 256 * width
    assert found[0]["floor_seconds"] == pytest.approx(flops / 4e9)


def test_all_sides_decode_the_same_tokens(monkeypatch):
    monkeypatch.setattr(language, "find_spec", lambda name: None)
    found = language.run(config=shape(), lora=LoRAConfig(rank=4, alpha=8), visual_tokens=8, tokens=4, rounds=1)
    assert [row["provider"] for row in found] == 2 * [language.UNMERGED, language.MERGED, language.OURS]
    assert all(row["correct"] and row["ratio"] for row in found)
    decode = found[0]
    assert decode["per_second"] == pytest.approx(1 / decode["seconds"])
    assert decode["over_floor"] == pytest.approx(decode["seconds"] / decode["floor_seconds"])


def test_other_tokens_get_no_ratio(monkeypatch):
    def without_lora(model: language.LanguageModel) -> language.LanguageModel:
        copied = twin(model)
        for name, parameter in copied.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        return copied

    twin = language.twin
    monkeypatch.setattr(language, "twin", without_lora)
    found = language.run(config=shape(), lora=LoRAConfig(rank=16, alpha=64), visual_tokens=8, tokens=8, rounds=1)
    assert [row["ratio"] is None for row in found] == 2 * [False, True, True]


def test_a_token_reads_all_weights_but_the_input_embedding():
    h, kv, mlp, vocab = 64, 32, 96, 1024
    layer = h * h + h + 2 * (h * kv + kv) + h * h + 3 * h * mlp + 2 * h
    for tied in (False, True):
        config = shape(tie_word_embeddings=tied)
        model = language.random_language(config, LoRAConfig(rank=4), _chat(config))
        assert language.weight_bytes(model.causal) == 4 * (2 * layer + h + vocab * h)


def test_the_twin_shares_the_embeddings_alone():
    config = shape()
    model = language.random_language(config, LoRAConfig(rank=4), _chat(config))
    copied = language.twin(model)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in copied.parameters()}
    assert shared == {
        id(model.causal.get_input_embeddings().weight),
        id(model.causal.get_output_embeddings().weight),
    }


def test_made_up_answers_depend_on_the_scan():
    config = shape()
    chat = _chat(config)
    model = language.random_language(config, LoRAConfig(rank=4), chat)
    torch.manual_seed(0)
    asked = chat.question(REPORT_REQUEST)
    answers = [
        language.generated(model.peft, language.prompt_rows(model, chat, torch.randn(8, 64), asked), 6).tokens
        for _ in range(4)
    ]
    assert len({tuple(answer) for answer in answers}) > 1
    assert all(len(answer) == 6 and chat.end_id not in answer for answer in answers)


def test_requests_equal_the_three_parts_in_a_row(setting):
    found = e2e.measure(setting, objects=(2,), tokens=4, rounds=1)
    assert [row["provider"] for row in found["rows"]] == 2 * [e2e.REFERENCE, e2e.COLD, e2e.WARM]
    assert all(row["correct"] and row["ratio"] for row in found["rows"]), found["rows"]
    masks = found["rows"][:3]
    assert masks[1]["dice"] > 0.999 and masks[0]["per_second"] == pytest.approx(2 / masks[0]["seconds"])
    stages = {row["stage"]: row for row in found["stages"]}
    assert {"crop", "vision", "prefix", "language", "slices", "masks", "voxels"} <= set(stages)
    floors = {name: row["floor_seconds"] for name, row in stages.items() if row["floor_seconds"]}
    assert masks[1]["floor_seconds"] == pytest.approx(sum(floors.values()))
    assert masks[2]["floor_seconds"] == pytest.approx(floors["language"] + floors["masks"])
    assert "vision" in e2e.table(found["stages"])


def test_other_masks_get_no_ratio(setting, monkeypatch):
    states = setting.reference.seg_states
    monkeypatch.setattr(setting.reference, "seg_states", lambda *given: -states(*given))
    found, stages = e2e.masks(setting, 1, (1e9, 1e9), 1)
    assert [row["ratio"] for row in found] == [1.0, None, None]
    assert not stages[0]["correct"]


def test_weights_that_answer_otherwise_are_not_measured(setting):
    weight = setting.reference.language.causal.get_output_embeddings().weight
    first = setting.engine.chat.answer(SEGMENT_ANSWER)[0]
    with setting.willing():
        weight[first] = -weight[first]
        with pytest.raises(RuntimeError, match="e2e: "):
            e2e.segmented(setting.engine.open(setting.volume), e2e.NAMES[:1])


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "without"])
@pytest.mark.parametrize("size", ["tiny", "micro"])
def test_the_package_or_the_plain_loop_gives_the_same_masks(size, memory):
    pytest.importorskip("sam2", reason="the sam2 package is not installed")
    pytest.importorskip("hydra", reason="hydra-core is not installed")
    config = replace(small(SAM2Config.preset(size, image_size=64)), seg=SegConfig(use_memory=memory))
    setting = e2e.build(config, slices=4, side=48)
    assert (setting.reference.package is not None) == (size == "tiny")
    names = ("aorta", "a small round stone in the left kidney")
    with setting.willing():
        want = setting.reference.segment(setting.volume, names)
        check = e2e.compare(e2e.segmented(setting.engine.open(setting.volume), names), want)
    assert check.correct, check
    assert want[0].logits.std() > 0.1 and (size == "micro" or 0 < want[0].voxels.float().mean() < 1)


def test_every_axis_is_measured_and_fitted(setting):
    points, fits = scaling.run(setting, most=2, slices=2, rounds=1)
    assert [fit["axis"] for fit in fits] == list(scaling.AXES)
    assert {(p["axis"], p["x"]) for p in points} == {
        *(("slices", n) for n in (1, 2, 4)),
        *(("resolution", n) for n in (32, 64)),
        *((axis, n) for axis in ("objects", "batch") for n in (1, 2)),
    }
    assert all((p["per_second"] is None) == (p["axis"] in ("slices", "resolution")) for p in points)
    assert "exponent" in scaling.table(fits)


def _chat(config: LanguageConfig) -> ChatTokens:
    return ChatTokens(language.shipped_tokenizer(), config.system, 8)
