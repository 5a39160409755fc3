"""Public checkpoints into a model directory: key layouts, strictness, and what comes out of the loaded model."""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from medvl_sam2.model.checkpoint import read_state
from medvl_sam2.model.config import VisionConfig, VolumeConfig
from medvl_sam2.model.convert import convert, internlm2_to_llama, read_language, sam2_config, split_wqkv, vision_state
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.sam2 import SAM2, SAM2Config
from medvl_sam2.model.vision import VisionEncoder
from medvl_sam2.training.corpus import text_corpus, train_tokenizer

SHAPE = {
    "vocab_size": 520,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}


def _qwen(tie: bool) -> torch.nn.Module:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SHAPE, tie_word_embeddings=tie)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(text_corpus(range(20)), 519)


def _internvl_folder(folder: Path, model: torch.nn.Module, tokenizer, *, tie: bool) -> Path:
    """InternVL2.5's layout: the LLM's keys under language_model., two shards, an image part that is not used."""
    state = {f"language_model.{key}": value.clone() for key, value in model.state_dict().items()}
    if tie:
        state.pop("language_model.lm_head.weight")
    state |= {"vision_model.embeddings.class_embedding": torch.zeros(1, 1, 4), "mlp1.0.weight": torch.zeros(4)}
    keys = sorted(state)
    shards = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    folder.mkdir()
    for name, part in shards.items():
        save_file({key: state[key] for key in part}, folder / name)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"llm_config": {"model_type": "qwen2", **SHAPE}}))
    return folder


@pytest.mark.parametrize("tie", [False, True])
def test_internvl_qwen2_gives_the_same_logits(tie, tokenizer, tmp_path):
    original = _qwen(tie)
    language, model, _ = read_language(_internvl_folder(tmp_path / "llm", original, tokenizer, tie=tie))
    ids = torch.randint(7, 500, (2, 11))
    with torch.no_grad():
        expected, got = original(ids).logits, model(ids).logits
    torch.testing.assert_close(got[..., : expected.shape[-1]], expected, rtol=1e-5, atol=1e-5)
    assert language.config["tie_word_embeddings"] == tie
    assert language.seg_token_id == tokenizer.convert_tokens_to_ids("[SEG]")


def test_the_seg_row_is_the_mean_of_the_others_and_appended(tokenizer, tmp_path):
    original = _qwen(False)
    plain = train_tokenizer(text_corpus(range(20)), SHAPE["vocab_size"])
    folder = _internvl_folder(tmp_path / "llm", original, plain, tie=False)
    # A tokenizer without [SEG], whose next id lies just past the embedding.
    for file in folder.glob("*token*.json"):
        file.write_text(file.read_text().replace("[SEG]", "[OLD]"))
    language, model, loaded = read_language(folder)
    rows = model.get_input_embeddings().weight
    assert language.seg_token_id == loaded.convert_tokens_to_ids("[SEG]") == SHAPE["vocab_size"]
    mean = original.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(rows[language.seg_token_id], mean, rtol=1e-5, atol=1e-6)


def _internlm2(seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, heads, kv = SHAPE["hidden_size"], SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    size, mlp = hidden // heads, SHAPE["intermediate_size"]
    shapes = {"model.tok_embeddings.weight": (SHAPE["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    shapes["output.weight"] = (SHAPE["vocab_size"], hidden)
    for i in range(SHAPE["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.attention.wqkv.weight": ((heads + 2 * kv) * size, hidden),
            f"model.layers.{i}.attention.wo.weight": (hidden, hidden),
            f"model.layers.{i}.feed_forward.w1.weight": (mlp, hidden),
            f"model.layers.{i}.feed_forward.w2.weight": (hidden, mlp),
            f"model.layers.{i}.feed_forward.w3.weight": (mlp, hidden),
            f"model.layers.{i}.attention_norm.weight": (hidden,),
            f"model.layers.{i}.ffn_norm.weight": (hidden,),
        }
    return {key: torch.randn(shape, generator=generator) * 0.2 for key, shape in shapes.items()}


def _internlm2_logits(state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """InternLM2 evaluated as its own code lays it out, in double."""
    w = {key: value.double() for key, value in state.items()}
    hidden, heads, kv = SHAPE["hidden_size"], SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    size, groups, n = hidden // heads, heads // kv, len(ids)
    angle = torch.arange(n).double()[:, None] / SHAPE["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + SHAPE["rms_norm_eps"]).rsqrt() * weight

    def rope(x):
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    x = w["model.tok_embeddings.weight"][ids]
    mask = torch.full((n, n), -math.inf, dtype=torch.double).triu(1)
    for i in range(SHAPE["num_hidden_layers"]):
        p = f"model.layers.{i}."
        packed = (norm(x, w[p + "attention_norm.weight"]) @ w[p + "attention.wqkv.weight"].T).view(
            n, kv, groups + 2, size
        )
        out = torch.empty(n, kv, groups, size, dtype=torch.double)
        for h in range(kv):
            key, value = rope(packed[:, h, -2]), packed[:, h, -1]
            for g in range(groups):
                score = rope(packed[:, h, g]) @ key.T / math.sqrt(size) + mask
                out[:, h, g] = score.softmax(-1) @ value
        x = x + out.reshape(n, hidden) @ w[p + "attention.wo.weight"].T
        y = norm(x, w[p + "ffn_norm.weight"])
        gate = torch.nn.functional.silu(y @ w[p + "feed_forward.w1.weight"].T)
        x = x + (gate * (y @ w[p + "feed_forward.w3.weight"].T)) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["output.weight"].T


def test_internlm2_re_laid_as_llama_equals_its_own_maths():
    state = _internlm2()
    laid = internlm2_to_llama(state, SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE, tie_word_embeddings=False)).eval()
    model.load_state_dict(laid, strict=True)
    ids = torch.randint(0, SHAPE["vocab_size"], (9,))
    with torch.no_grad():
        got = model(ids[None]).logits[0].double()
    torch.testing.assert_close(got, _internlm2_logits(state, ids), rtol=1e-4, atol=1e-4)


def test_wqkv_rows_go_where_their_head_is():
    heads, kv, size = 6, 2, 3
    rows = torch.arange((heads + 2 * kv) * size).float()[:, None]
    q, k, v = split_wqkv(rows, heads, kv)
    # Groups of five heads: three queries, a key, a value; three rows each.
    assert q[:, 0].tolist() == [*range(9), *range(15, 24)]
    assert k[:, 0].tolist() == [9, 10, 11, 24, 25, 26]
    assert v[:, 0].tolist() == [12, 13, 14, 27, 28, 29]


def test_vit_is_read_alone_or_out_of_the_whole_clip(tmp_path):
    torch.manual_seed(0)
    vision = VisionEncoder(VolumeConfig(size=(8, 32, 32)), VisionConfig(32, 1, 2, 64))
    # The public .bin holds bf16 views into one storage.
    flat = torch.cat([p.detach().flatten() for p in vision.state_dict().values()]).bfloat16()
    views, at = {}, 0
    for key, value in vision.state_dict().items():
        views[key] = flat[at : at + value.numel()].view(value.shape)
        at += value.numel()
    torch.save(views, tmp_path / "pretrained_ViT.bin")
    alone = vision_state(read_state(tmp_path / "pretrained_ViT.bin"))
    clip = {f"vision_encoder.{key}": value.clone() for key, value in views.items()} | {"logit_scale": torch.ones(1)}
    save_file(clip, tmp_path / "model.safetensors")
    whole = vision_state(read_state(tmp_path / "model.safetensors"))
    assert alone.keys() == whole.keys() == vision.state_dict().keys()
    assert all(torch.equal(alone[key], whole[key]) for key in alone)
    assert alone["norm.weight"].untyped_storage().nbytes() == alone["norm.weight"].nbytes


@pytest.mark.parametrize("variant", ["tiny", "small", "base_plus", "large"])
@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_sam2_variant_is_told_by_its_keys(variant, version):
    with torch.device("meta"):
        state = SAM2(SAM2Config.preset(variant, version)).state_dict()
    assert sam2_config(state, 512, "x.pt") == SAM2Config.preset(variant, version, image_size=512)


def test_convert_writes_a_directory_that_loads_to_the_same_weights(tokenizer, tmp_path):
    torch.manual_seed(5)
    vision = VisionEncoder(VolumeConfig(), VisionConfig()).bfloat16()
    torch.save(vision.state_dict(), tmp_path / "vit.bin")
    sam2 = SAM2(SAM2Config.preset("tiny", image_size=512)).bfloat16()
    torch.save({"model": sam2.state_dict()}, tmp_path / "sam2.1_hiera_tiny.pt")
    original = _qwen(False).bfloat16()
    llm = _internvl_folder(tmp_path / "llm", original, tokenizer, tie=False)
    sources = {"vit": tmp_path / "vit.bin", "llm": llm, "sam2": tmp_path / "sam2.1_hiera_tiny.pt"}
    convert(**sources, out=tmp_path / "model", image_size=512)
    model = MedVLSAM2.from_pretrained(tmp_path / "model")
    for part, source in ((model.vision, vision), (model.sam2, sam2)):
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in part.state_dict().items())
    ids = torch.randint(7, 500, (1, 7))
    model.float(), original.float()
    with torch.no_grad():
        hidden = model.language.hidden(model.language.embed(ids))
        got, expected = model.language.logits(hidden), original(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_wrong_keys_are_one_error_that_lists_them(tokenizer, tmp_path):
    original = _qwen(False)
    folder = _internvl_folder(tmp_path / "llm", original, tokenizer, tie=False)
    name = next(iter(folder.glob("*00001*.safetensors")))
    state = read_state(name)
    gone = sorted(key for key in state if ".layers." in key)[0]
    state["language_model.model.extra.weight"] = state.pop(gone)
    save_file(state, name)
    with pytest.raises(ValueError) as error:
        read_language(folder)
    assert f"missing {gone.removeprefix('language_model.')}" in str(error.value)
    assert "left over model.extra.weight" in str(error.value)


class _Code:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    with open(tmp_path / "bad.pt", "wb") as file:
        pickle.dump({"model": _Code()}, file)
    with pytest.raises(ValueError, match="pickle with code"):
        read_state(tmp_path / "bad.pt")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x10\x00\x00\x00\x00\x00\x00\x00garbage"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_files_are_one_sentence(content, suffix, tmp_path):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.(safetensors|pt): expected"):
        read_state(path)
