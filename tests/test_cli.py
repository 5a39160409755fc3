"""The command line: what it prints, its exit status, and one sentence for every kind of bad input."""

import errno
import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from medvl_sam2.cli import main
from medvl_sam2.engine.language.transformers import TransformersBackend
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.training.phantom import Phantom

ROOT = Path(__file__).resolve().parents[1]


def write_ct(path: Path, shape=(24, 20, 16), affine=None, dtype=np.int16) -> Path:
    """A ball of soft tissue in air."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    voxels = np.where((grid**2).sum(0) < 0.7, 40, -1000).astype(dtype)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.5, 1.5, 3, 1]) if affine is None else affine), path)
    return path


@pytest.fixture
def ct(tmp_path):
    return write_ct(tmp_path / "ct.nii.gz")


@pytest.fixture
def run(capsys, small_model):
    """Runs a verb in this process: status, stdout, stderr."""

    def call(*arguments: object, model: object = small_model):
        verb, *rest = map(str, arguments)
        extra = ["--model", str(model)] if verb in ("segment", "ask", "report", "demo", "evaluate") else []
        try:
            status = main([verb, *rest, *extra])
        except SystemExit as left:
            status = left.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def assert_input_error(result, *words: object):
    """Exit status 2, nothing on stdout, one sentence on stderr with the words in it."""
    status, out, err = result
    assert status == 2, err
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("WARNING")]
    assert len(lines) == 1, err
    assert lines[0].startswith("medvl-sam2"), err
    assert "error:" in lines[0]
    for word in words:
        assert str(word) in lines[0]


def broken_file(tmp_path: Path, kind: str) -> Path:
    """A file that is not a usable scan."""
    path = tmp_path / f"{kind}.nii.gz"
    voxels = np.full((12, 12, 6), -1000, np.float32)
    if kind == "text":
        path.write_text("this is not a scan")
        return path
    if kind == "truncated":
        write_ct(path, (64, 64, 32))
        path.write_bytes(path.read_bytes()[:900])
        return path
    if kind == "nan":
        voxels[3, 3, 3] = np.nan
    elif kind == "infinite":
        voxels[3, 3, 3] = np.inf
    elif kind == "flat":
        voxels = voxels[:, :, 0]
    elif kind == "frames":
        voxels = np.stack([voxels] * 5, -1)
    image = nib.Nifti1Image(voxels, np.eye(4))
    if kind == "singular":
        raw = bytearray(image.to_bytes())
        # The third row of the affine, srow_z of the NIfTI-1 header.
        raw[312:328] = bytes(16)
        path.write_bytes(gzip.compress(raw))
        return path
    nib.save(image, path)
    return path


@pytest.mark.parametrize("kind", ["text", "truncated", "nan", "infinite", "flat", "frames", "singular"])
@pytest.mark.parametrize("verb", ["segment", "ask", "report"])
def test_unusable_scan(run, tmp_path, kind, verb):
    scan = broken_file(tmp_path, kind)
    before = sorted(tmp_path.iterdir())
    rest = {"segment": ["liver", "-o", tmp_path / "out.nii.gz"], "ask": ["Why?"], "report": ["-o", tmp_path / "r.txt"]}
    assert_input_error(run(verb, scan, *rest[verb]), scan.name)
    assert sorted(tmp_path.iterdir()) == before


def test_missing_scan(run, tmp_path):
    assert_input_error(
        run("segment", tmp_path / "no.nii.gz", "liver", "-o", tmp_path / "out.nii.gz"), "no.nii.gz", "no such"
    )
    assert not (tmp_path / "out.nii.gz").exists()


def test_empty_dicom_folder(run, tmp_path):
    (tmp_path / "series").mkdir()
    assert_input_error(run("report", tmp_path / "series"), "series")


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--point", "100,2,3", "outside"),
        ("--point", "-1,2,3", "outside"),
        ("--point", "1,2", "--point"),
        ("--point", "1,2,3,x", "--point"),
        ("--box", "9,9,9,2,12,12", "upside down"),
        ("--box", "90,90,90,95,95,95", "outside"),
        ("--box", "1,2,3", "--box"),
        ("--space", "mni", "--space"),
        ("--dtype", "int3", "dtype"),
        ("--device", "abacus", "device"),
    ],
)
def test_wrong_argument(run, ct, tmp_path, option, value, word):
    out = tmp_path / "out.nii.gz"
    assert_input_error(run("segment", ct, "liver", "-o", out, option, value), word)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ask", "CT", "Which?", *["--choice=part"] * 27), ("choices: expected at most 26", "got 27")),
        (("evaluate", "--processes", "0"), ("processes: expected 1 or more, got 0",)),
        (("train", "--set", "seed={", "--out", "OUT"), ("set: seed={: not YAML",)),
        (("train", "--config", "YAML", "--out", "OUT"), ("c.yaml: expected sections", "got ['a']")),
    ],
    ids=["choices", "processes", "set", "config"],
)
def test_mistakes_are_told_in_words(run, ct, tmp_path, arguments, words):
    (tmp_path / "c.yaml").write_text("- a")
    places = {"CT": ct, "OUT": tmp_path / "out", "YAML": tmp_path / "c.yaml"}
    assert_input_error(run(*(places.get(argument, argument) for argument in arguments)), *words)
    assert not (tmp_path / "out").exists()


def test_evaluation_of_nothing(run, tmp_path):
    case = tmp_path / "set" / "one"
    case.mkdir(parents=True)
    write_ct(case / "ct.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((24, 20, 16), np.uint8), np.diag([1.5, 1.5, 3, 1])), case / "seg.nii.gz")
    (case / "labels.json").write_text('{"1": "liver"}')
    assert run("data", "index", tmp_path / "set", "-o", tmp_path / "m.jsonl")[0] == 0
    splits = [name for name in ("train", "val", "test") if not (tmp_path / f"m.{name}.txt").read_text()]
    assert len(splits) == 2
    for split in splits:
        result = run("evaluate", "--data", tmp_path / "m.jsonl", "--split", split)
        assert_input_error(result, f"split '{split}' of {tmp_path / 'm.jsonl'}", "got none")
    for table in ('{"liver": 1}', '{"seg.nii.gz": {"liver": 1}}'):
        (case / "labels.json").write_text(table)
        result = run("evaluate", "--data", tmp_path / "set", "--task", "segmentation")
        assert_input_error(result, case / "labels.json", 'as {"1": "liver"}, got {"liver": 1}')


def test_batch_with_a_failed_scan(run, ct, small_model, tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    options = ("--model", small_model, "--device", "cpu", "--question", "What is seen?", "--json")
    for done in (1, 0):
        status, text, _ = run("batch", tmp_path, tmp_path / "out", *options)
        document = json.loads(text.splitlines()[-1])
        assert (status, document["done"], document["failed"]) == (1, done, 1)
        assert [problem["path"] for problem in document["problems"]] == ["bad.nii.gz"]
    (tmp_path / "bad.nii.gz").unlink()
    status, text, _ = run("batch", tmp_path, tmp_path / "out", *options)
    assert (status, json.loads(text)["problems"]) == (0, [])


def test_nothing_to_segment(run, ct, tmp_path):
    assert_input_error(run("segment", ct, "-o", tmp_path / "out.nii.gz"), "target")
    assert_input_error(run("segment", ct, "a", "b", "--point", "1,2,3", "-o", tmp_path / "out.nii.gz"), "--point")


def test_unknown_verb_and_option(run, ct):
    assert_input_error(run("segmentt", ct), "segmentt")
    assert_input_error(run("report", ct, "--loud"), "--loud")


@pytest.mark.parametrize("name", ["no-such-model", "1b", "/tmp"])
def test_unknown_model(run, ct, name):
    assert_input_error(run("report", ct, model=name), name)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "truncated"])
def test_damaged_checkpoint(run, ct, small_model, tmp_path, fault):
    model = tmp_path / "model"
    for source in small_model.rglob("*"):
        if source.is_file():
            target = model / source.relative_to(small_model)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    key = "seg_bridge.text_hidden_fcs.0.weight"
    if fault == "missing":
        del tensors[key]
    elif fault == "extra":
        key = "surprise.weight"
        tensors[key] = tensors["seg_bridge.text_hidden_fcs.0.bias"].clone()
    elif fault == "shape":
        tensors[key] = tensors[key][:3].contiguous()
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
        assert_input_error(run("report", ct, model=model), "model")
    else:
        save_file(tensors, weights)
        assert_input_error(run("report", ct, model=model), key)


@pytest.mark.parametrize("place", ["no_such_folder/out.nii.gz", "ct.nii.gz/out.nii.gz", "out.jpeg", "."])
def test_output_is_checked_before_the_work(run, ct, tmp_path, place, monkeypatch):
    monkeypatch.setattr("medvl_sam2._verbs.read_volume", lambda *a, **k: pytest.fail("the work had begun"))
    assert_input_error(run("segment", ct, "liver", "-o", tmp_path / place), Path(place).name)
    assert [path.name for path in tmp_path.iterdir()] == ["ct.nii.gz"]


def test_full_disk_keeps_the_old_output(run, ct, tmp_path, monkeypatch):
    out = tmp_path / "out.nii.gz"
    out.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("medvl_sam2.engine.masks.os.fsync", full)
    result = run("segment", ct, "-o", out, "--point", "12,10,8")
    assert_input_error(result, "out.nii.gz", "No space left")
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ct.nii.gz", "out.nii.gz"]


def test_full_disk_keeps_the_old_report(run, ct, tmp_path, monkeypatch):
    out = tmp_path / "report.txt"
    out.write_text("old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("medvl_sam2.engine.files.Path.write_text", full)
    assert_input_error(run("report", ct, "-o", out), "report.txt", "No space left")
    assert out.read_text() == "old"


def test_segment_writes_a_mask_on_the_source_grid(run, tmp_path):
    affine = np.array([[-1.5, 0, 0, 20], [0, 1.4, 0.1, -7], [0, -0.1, 3, 5], [0, 0, 0, 1]], float)
    scan = write_ct(tmp_path / "ct.nii.gz", affine=affine)
    out = tmp_path / "out.nii.gz"
    status, text, _ = run("segment", scan, "-o", out, "--point", "12,10,8,+", "--point", "1,1,8,-", "--json")
    assert status == 0
    document = json.loads(text.splitlines()[-1])
    (shown,) = document["objects"]
    source, mask = nib.load(scan), nib.load(out)
    assert mask.shape == source.shape
    np.testing.assert_allclose(mask.affine, source.affine, atol=1e-6)
    assert mask.get_data_dtype() == np.uint8
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    assert shown["volume_ml"] == pytest.approx((mask.get_fdata() == 1).sum() * voxel_ml, abs=0.01)
    assert document["output"] == str(out)


def test_negative_coordinates_in_millimetres(run, tmp_path):
    scan = write_ct(
        tmp_path / "ct.nii.gz", affine=np.array([[1.5, 0, 0, -40], [0, 1.5, 0, -30], [0, 0, 3, 9], [0, 0, 0, 1.0]])
    )
    status, _, err = run("segment", scan, "-o", tmp_path / "o.nii.gz", "--space", "ras", "--point", "-22,-15,33")
    assert status == 0, err


def decide(monkeypatch, margin):
    """Make the random model say whether each target is there."""
    weigh = TransformersBackend._weigh

    def weighed(backend, hidden, start, answer, rival):
        result = weigh(backend, hidden, start, answer, rival)
        return replace(result, margin=margin(), first=answer[0])

    monkeypatch.setattr(TransformersBackend, "_weigh", weighed)


def test_several_names_make_one_label_map(run, ct, tmp_path, monkeypatch):
    margins = iter([1.0, -1.0, 1.0])
    decide(monkeypatch, lambda: next(margins))
    status, text, _ = run("segment", ct, "liver", "spleen", "left kidney", "-o", tmp_path / "o.seg.nrrd", "--json")
    assert status == 0
    shown = json.loads(text.splitlines()[-1])["objects"]
    assert [(one["name"], one["label"], one["absent"]) for one in shown] == [
        ("liver", 1, False),
        ("spleen", None, True),
        ("left kidney", 3, False),
    ]
    assert shown[1]["answer"] == "There is no spleen in this scan."
    assert (tmp_path / "o.seg.nrrd").is_file()


def test_nothing_found_writes_no_file(run, ct, tmp_path, monkeypatch):
    decide(monkeypatch, lambda: -1.0)
    status, text, _ = run("segment", ct, "spleen", "-o", tmp_path / "o.nii.gz")
    assert status == 0
    assert "There is no spleen in this scan." in text
    assert not (tmp_path / "o.nii.gz").exists()
    assert text.endswith("so no file was written.\n")
    (tmp_path / "o.nii.gz").write_bytes(b"older")
    status, text, _ = run("segment", ct, "spleen", "-o", tmp_path / "o.nii.gz")
    assert status == 0
    assert text.endswith(f"no file was written; {tmp_path / 'o.nii.gz'} is from an earlier run.\n")
    assert (tmp_path / "o.nii.gz").read_bytes() == b"older"


def test_single_slice_works(run, tmp_path):
    scan = write_ct(tmp_path / "one.nii.gz", (24, 20, 1))
    assert run("segment", scan, "-o", tmp_path / "o.nii.gz", "--point", "12,10,0")[0] == 0
    assert nib.load(tmp_path / "o.nii.gz").shape == (24, 20, 1)


def test_mr_image_is_read_with_a_warning(run, shared_data, caplog):
    status, text, _ = run("report", shared_data / "odd_headers" / "mr_torso_not_ct.nii.gz", "--json")
    assert status == 0
    assert "MR image" in caplog.text
    assert "MR image" in json.loads(text)["warnings"][0]


def test_ask_with_choices(run, ct):
    status, text, _ = run("ask", ct, "Which side?", "--choice", "left", "--choice", "right", "--json")
    assert status == 0
    document = json.loads(text)
    assert document["choices"] == ["left", "right"]
    assert document["choice"] in (0, 1, None)
    assert set(document["seconds"]) >= {"vision", "prefix", "language"}


def test_process_prints_json_last_and_nothing_on_stderr(ct, small_model):
    done = subprocess.run(
        [sys.executable, "-m", "medvl_sam2.cli", "report", str(ct), "--model", str(small_model), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout.splitlines()[-1])["report"] is not None


def test_failure_that_is_not_the_users_is_status_1(run, ct, monkeypatch):
    monkeypatch.setattr("medvl_sam2.engine.session.VolumeSession.report", lambda *_: 1 / 0)
    status, out, err = run("report", ct)
    assert (status, out) == (1, "")
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err


def test_info(run, monkeypatch):
    monkeypatch.setenv("MEDVL_SAM2_API_KEYS", "hush")
    monkeypatch.setenv("MEDVL_SAM2_DISABLE", "mixer")
    status, text, _ = run("info", "--json")
    assert status == 0
    document = json.loads(text)
    assert document["versions"]["torch"]
    assert {kernel["name"] for kernel in document["kernels"]} >= {"mask_epilogue", "mixer", "volume_ingest"}
    assert all(kernel["reason"] for kernel in document["kernels"])
    assert document["attention"]["used"]
    assert document["environment"]["MEDVL_SAM2_DISABLE"] == "mixer"
    assert "hush" not in text
    assert run("info")[0] == 0
    # Of every package that an extra brings, those for development aside, it tells whether it is in use.
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = {re.match(r"[\w.-]+", package)[0] for name in extras if name != "dev" for package in extras[name]}
    assert brought - {"medvl-sam2"} <= {package["name"] for package in document["packages"]}


def test_phantom_and_seeds(run, tmp_path, monkeypatch):
    native = Phantom.native
    monkeypatch.setattr(Phantom, "native", lambda self, _: native(self, 48))
    status, text, _ = run("phantom", "--seed", "1000001", "--out", tmp_path / "p", "--json")
    assert status == 0
    assert json.loads(text)["seed"] == 1_000_001
    assert (tmp_path / "p" / "ct.nii.gz").is_file()
    assert_input_error(run("phantom", "--seed", "-4", "--out", tmp_path / "q"), "seed")
    assert_input_error(run("demo", "--seed", "3", "--out", tmp_path / "q"), "seed")
    assert_input_error(run("evaluate", "--seeds", "9:3"), "--seeds")
    assert_input_error(run("evaluate", "--seeds", "9:12"), "seeds")
    assert_input_error(run("evaluate", "--data", tmp_path / "none"), "none")
    assert not (tmp_path / "q").exists()


def test_train_config_mistakes(run, tmp_path):
    assert_input_error(run("train", "--config", "no-such", "--out", tmp_path / "t"), "no-such")
    assert_input_error(run("train", "--set", "stage1.stepz=3", "--out", tmp_path / "t"), "stepz")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_convert_for_vllm_writes_what_plain_transformers_loads(run, tmp_path, small_model, merge, monkeypatch):
    # The tiny weights are of half precision, in which a sum is another number; the small model's are not.
    out, source = tmp_path / "out", small_model if merge else "tiny"
    arguments = ["convert", "--for", "vllm", "--model", source, "-o", out, "--json", *["--merge"] * merge]
    status, text, _ = run(*arguments)
    assert status == 0
    assert json.loads(text.splitlines()[-1])["language"] == str(out)
    base, adapter = out / "base", out / "adapter"
    assert sorted(file.name for file in base.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((base / "config.json").read_text())
    assert (config["architectures"], config["tie_word_embeddings"]) == (["Qwen2ForCausalLM"], False)
    assert adapter.exists() == (not merge)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if not merge:
        lora = json.loads((adapter / "adapter_config.json").read_text())
        assert lora["base_model_name_or_path"] == "base"
        assert not lora["modules_to_save"], "vLLM refuses adapters with whole modules"
        assert all("lora_" in name for name in load_file(adapter / "adapter_model.safetensors"))
        loaded = PeftModel.from_pretrained(loaded, adapter).eval()
    model = MedVLSAM2.from_pretrained(source, dtype=torch.float32)
    ids = torch.tensor([model.chat.question("Segment the liver.") + model.chat.answer("It is [SEG].")])
    with torch.no_grad():
        expected = model.language.logits(model.language.hidden(model.language.embed(ids)))
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert_input_error(run(*arguments), out)
    # A folder with the preset's name is not the preset.
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert_input_error(run("convert", "--for", "vllm", "--model", "tiny"), "-o DIR")


def test_convert_refuses_code_and_leaves_nothing(run, small_model, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    llm, vit, sam2 = tmp_path / "llm", tmp_path / "pretrained_ViT.bin", tmp_path / "sam2.1_hiera_tiny.pt"
    out = tmp_path / "model"
    shutil.copytree(small_model / "language", llm)
    for file in small_model.glob("tokenizer*"):
        shutil.copy(file, llm)
    sam2.write_bytes(pickle.dumps({"model": Bomb()}, protocol=2))
    arguments = ("--llm", llm, "--sam2", sam2, "--vit", vit, "-o", out)
    assert_input_error(run("convert", *arguments), sam2.name, "code")
    assert_input_error(run("convert", *arguments[2:], "--llm", tmp_path / "none"), "none")
    assert not (tmp_path / "exploded").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llm", sam2.name]
    out.mkdir()
    (out / "kept").touch()
    assert_input_error(run("convert", *arguments), "model")
    assert (out / "kept").exists()
