"""Arms of an experiment on a small model: a common beginning, and the same end after a stop anywhere."""

import dataclasses
import json

import pytest
import torch

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.training import arms, train
from medvl_sam2.training.arms import AFTER_STAGE2, base_model, fingerprint, run_log, train_arm
from medvl_sam2.training.config import TrainConfig, load_config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    config = load_config("experiment", ["precision=fp32", "save_every=1", "log_every=1", "device=cpu"])
    config.data = dataclasses.replace(config.data, phantoms=2, runs=1, run_length=2, workers=1)
    config.data.cache = str(tmp_path_factory.mktemp("phantoms"))
    for phase in train.PHASES:
        changed = dataclasses.replace(getattr(config, phase), steps=2, batch=1, questions=2, requests=2)
        setattr(config, phase, changed)
    return config


@pytest.fixture(scope="module")
def whole(config, small_model, tmp_path_factory):
    """A run that was never stopped."""
    return train_arm(small_model, tmp_path_factory.mktemp("whole"), "arm", config, "mixer", keep_stage2=True)


def weights(directory) -> dict[str, torch.Tensor]:
    return MedVLSAM2.from_pretrained(directory, torch.float32).state_dict()


def test_an_arm_begins_as_its_base_but_for_projector_and_lora(config, small_model, tmp_path):
    base = weights(small_model)
    for kind in ("mixer", "grouped_linear"):
        model, batches = arms._build(small_model, config, kind, tmp_path)
        assert model.config.projector.kind == kind and model.config.projector.tokens == 8
        assert batches.chat.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        same = {key for key, value in model.state_dict().items() if key in base and torch.equal(value, base[key])}
        assert {key for key in base if not key.startswith("projector.") and ".lora_" not in key} <= same
        assert all((value == 0).all() for key, value in model.state_dict().items() if "lora_B" in key)
        assert not same & {key for key in base if key.startswith("projector.") and key.endswith("0.weight")}


def test_a_finished_arm_keeps_its_models_and_logs(whole, small_model):
    assert sorted(path.name for path in whole.iterdir()) == [AFTER_STAGE2, "arm.json", "logs", "model"]
    base, middle, end = weights(small_model), weights(whole / AFTER_STAGE2), weights(whole / "model")
    decoder = next(key for key in end if key.startswith("sam2.sam_mask_decoder.") and end[key].ndim == 2)
    assert torch.equal(base[decoder], middle[decoder]) and not torch.equal(middle[decoder], end[decoder])
    log = run_log(whole)
    assert [step for step, _ in log["curve"]] == [1, 2, 3, 4, 5, 6] and log["minutes"] >= 0


@pytest.mark.parametrize("moment", ["in stage 2", "while the model of stage 2 is written", "in stage 3", "at the end"])
def test_an_arm_stopped_anywhere_ends_alike(moment, whole, config, small_model, tmp_path, monkeypatch):
    batch, save, seen = arms.Batches._joint, MedVLSAM2.save_pretrained, []

    def joint(self, step, phase, tag, **options):
        # In a worker, which hands it on.
        if moment == f"in stage {tag - 2}" and step == 1:
            raise InterruptedError
        return batch(self, step, phase, tag, **options)

    def half(self, directory):
        seen.append(directory)
        save(self, directory)
        if moment == ("while the model of stage 2 is written" if len(seen) == 1 else "at the end"):
            (directory / "config.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(arms.Batches, "_joint", joint)
        patched.setattr(MedVLSAM2, "save_pretrained", half)
        with pytest.raises((InterruptedError, KeyboardInterrupt)):
            train_arm(small_model, tmp_path, "arm", config, "mixer", keep_stage2=True)
    resumed = train_arm(small_model, tmp_path, "arm", config, "mixer", keep_stage2=True)
    for name in (AFTER_STAGE2, "model"):
        expected = weights(whole / name)
        for key, value in weights(resumed / name).items():
            assert torch.equal(value, expected[key]), key
    assert run_log(resumed)["curve"] == run_log(whole)["curve"]


def test_a_folder_of_another_run_is_refused(whole, config, small_model):
    changed = dataclasses.replace(config, stage3=dataclasses.replace(config.stage3, steps=3))
    with pytest.raises(InputError, match=r"was begun with config.stage3.steps 2, not 3"):
        train_arm(small_model, whole.parents[1], "arm", changed, "mixer")
    with pytest.raises(InputError, match="was begun with base"):
        train_arm(whole / "model", whole.parents[1], "arm", config, "mixer")
    # What does not change the outcome may change.
    free = dataclasses.replace(config, save_every=7, device="auto")
    train_arm(small_model, whole.parents[1], "arm", free, "mixer")


def test_a_fingerprint_tells_weights_apart(whole, small_model):
    assert fingerprint(small_model) == fingerprint(small_model)
    assert len({fingerprint(each) for each in (small_model, whole / "model", whole / AFTER_STAGE2)}) == 3


def test_the_base_may_be_a_model_or_a_run(config, small_model, tmp_path, monkeypatch):
    assert base_model(small_model, config, tmp_path) == small_model and base_model("tiny", config, tmp_path) == "tiny"
    with pytest.raises(InputError, match="expected a preset, a model directory or the folder of a training run"):
        base_model(tmp_path / "nothing", config, tmp_path)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="of a finished run, found none"):
        base_model(run, config, tmp_path)
    for steps, part in enumerate(arms._PARTS, start=5):
        torch.save({"step": steps}, run / "checkpoints" / f"{part}.pt")
    asked = []

    def fake_train(config, out, *, until, settings):
        asked.append(({part: getattr(config, part).steps for part in arms._PARTS}, until))
        assert all((out / "checkpoints" / f"{part}.pt").is_file() for part in arms._PARTS)
        return out / "model"

    monkeypatch.setattr(train, "run", fake_train)
    for _ in range(2):
        assert base_model(run, config, tmp_path) == tmp_path / "base" / "model"
    # Every part counts as finished, and the stages are left to the arms.
    assert asked == [({part: steps for steps, part in enumerate(arms._PARTS, start=5)}, arms._PARTS[-1])]
    torch.save({"step": 9}, run / "checkpoints" / "sam2.pt")
    with pytest.raises(InputError, match="parts of another run"):
        base_model(run, config, tmp_path)
    assert json.loads((tmp_path / "base" / "parts.done").read_text())
