"""Image features in chunks, as they are needed, and on the host."""

import logging

import pytest
import torch
from _slices import CONFIG, OURS, SIZE, assert_equal, assert_same_features, embeddings, points
from torch import Tensor

from medvl_sam2.engine.propagation import propagate
from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.engine.segmenter import Segmenter
from medvl_sam2.engine.slice_features import (
    KEPT_SHARE,
    HostFeatures,
    LazyFeatures,
    SliceEncoder,
    choose_chunk,
    choose_place,
    feature_bytes,
    working_bytes,
)
from medvl_sam2.model.config import SegConfig
from medvl_sam2.model.sam2 import SAM2, SliceFeatures


def test_lazy_features_and_a_lack_of_memory(
    sam2: SAM2, runner: SliceRunner, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(10, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        encoder = SliceEncoder(sam2, chunk=8)
        whole = encoder.encode(lambda a, b: images[a:b], 0, 10)
        want = propagate(runner, whole, {4: points(1)}, start=4, **OURS)
        assert_same_features(whole, sam2.encode_images(images))
        encode, sizes = encoder._encode, []

        def scarce(x: Tensor) -> SliceFeatures:
            sizes.append(len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return encode(x)

        monkeypatch.setattr(encoder, "_encode", scarce)
        with caplog.at_level(logging.WARNING):
            lazy = LazyFeatures(encoder, lambda a, b: images[a:b], 10)
            got = propagate(runner, lazy, {4: points(1)}, start=4, chunk=4, **OURS)
    assert_equal(got, want, tolerance=1e-4)
    assert [record.message for record in caplog.records] == ["out of memory: encoding 2 slices at a time from here on"]
    assert max(sizes[-3:]) == 2
    monkeypatch.setattr(encoder, "_encode", lambda x: (_ for _ in ()).throw(RuntimeError("shape")))
    with pytest.raises(RuntimeError, match="shape"):
        encoder.encode(lambda a, b: images[a:b], 0, 10)


@torch.inference_mode()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_features_on_the_host_give_the_same_masks(sam2: SAM2, device: str) -> None:
    images = torch.randn(10, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4)).to(device)
    model = SAM2(CONFIG).eval().to(device)
    model.load_state_dict(sam2.state_dict())
    found = {}
    for keep in ("device", "host"):
        segmenter = Segmenter(model, SegConfig(), chunk=4, keep=keep)
        features = segmenter.encode(lambda a, b: images[a:b], 10)
        assert features.nbytes == 10 * feature_bytes(CONFIG, 4)
        found[keep] = segmenter.by_text(features, embeddings(2).to(device))
    assert isinstance(features, HostFeatures) and features[3].vision.device.type == device
    assert features._kept.vision.device.type == "cpu" and features._kept.vision.is_pinned() == (device == "cuda")
    for mine, theirs in zip(found["host"], found["device"]):
        assert mine.start == theirs.start
        got, want = ((x.logits[:, None], x.scores[:, None]) for x in (mine, theirs))
        assert_equal(got, want, tolerance=1e-5)


def test_features_go_to_the_host_where_they_would_crowd_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, each = torch.device("cuda"), feature_bytes(CONFIG, 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * each, 100 * each))
    assert choose_place(CONFIG, cuda, torch.bfloat16, 20 // KEPT_SHARE) == "device"
    assert choose_place(CONFIG, cuda, torch.bfloat16, 20 // KEPT_SHARE + 1) == "host"
    assert choose_place(CONFIG, torch.device("cpu"), torch.float32, 10_000) == "device"


def test_chunks_follow_the_budget() -> None:
    cpu, each = torch.device("cpu"), working_bytes(CONFIG, 4)
    assert choose_chunk(CONFIG, cpu, torch.float32, 3 * each) == 3
    assert choose_chunk(CONFIG, cpu, torch.float32, each // 2) == 1
