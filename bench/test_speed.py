"""`pytest bench`: every side at small sizes under pytest-benchmark, in groups of what may be compared.

A side is timed only after it gave what its group's first one gives. For numbers worth keeping, and at the model's
sizes, run `medvl-sam2 bench`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from medvl_sam2.bench import e2e, encoder, ingest, language, segmenter
from medvl_sam2.bench.rows import MOST_ERROR, relative_error
from medvl_sam2.model.config import MedVLConfig, VisionConfig
from medvl_sam2.model.presets import preset
from medvl_sam2.model.prompts import ChatTokens
from medvl_sam2.model.sam2 import SAM2Config

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


@dataclass(frozen=True)
class Group:
    """Sides by name, the first being what one would run otherwise, and whether a result is like the first one's."""

    sides: dict[str, Callable[[], Any]]
    agrees: Callable[[Any, Any], bool]


def _close(got: Tensor, want: Tensor) -> bool:
    return relative_error(got, want) <= MOST_ERROR


def _config() -> MedVLConfig:
    config = preset("tiny")
    return replace(config, sam2=SAM2Config.preset("micro", image_size=128))


def _ingest() -> Group:
    return Group(ingest.sides((100, 256, 256), (32, 128, 128)), _close)


def _encoder() -> Group:
    config = preset("1b-fast")
    sides, *_ = encoder.sides(config.volume, VisionConfig(layers=1))
    return Group(sides, _close)


def _language() -> Group:
    config = _config()
    chat = ChatTokens(language.shipped_tokenizer(), config.language.system, config.projector.tokens)
    plain = language.random_language(config.language, config.lora, chat)
    scan = torch.randn(config.projector.tokens, config.language.hidden_size)
    return Group(language.make_sides(plain, chat, scan, 16), lambda got, want: got.tokens == want.tokens)


def _segmenter() -> Group:
    for package, module in (("sam2", "sam2"), ("hydra-core", "hydra")):
        pytest.importorskip(module, reason=f"the package {package} is not installed")
    return Group(segmenter.sides(*segmenter.models("tiny", 128), segmenter.made_up_images(4, 128), 2), _close)


def _e2e() -> Group:
    setting = e2e.build(_config(), slices=6, side=128)
    known, names = setting.engine.open(setting.volume), e2e.NAMES[:2]

    def willing(request: Callable[[], list]) -> Callable[[], list]:
        def answered() -> list:
            with setting.willing():
                return request()

        return answered

    sides = {
        e2e.REFERENCE: lambda: setting.reference.segment(setting.volume, names),
        e2e.COLD: lambda: e2e.segmented(setting.engine.open(setting.volume), names),
        e2e.WARM: lambda: e2e.segmented(known, names),
    }
    return Group(
        {name: willing(request) for name, request in sides.items()},
        lambda got, want: got is want or e2e.compare(got, want).correct,
    )


GROUPS = {
    "ingest": (_ingest, ("whole volume", "ours")),
    "encoder": (_encoder, ("naive attention", "ours")),
    "language": (_language, (language.UNMERGED, language.MERGED, language.OURS)),
    "segmenter": (_segmenter, (segmenter.PACKAGE, segmenter.OURS)),
    "e2e": (_e2e, (e2e.REFERENCE, e2e.COLD, e2e.WARM)),
}


@cache
def _group(name: str) -> tuple[Group, Any]:
    group = GROUPS[name][0]()
    return group, next(iter(group.sides.values()))()


def _cases() -> Iterator[Any]:
    for name, (_, sides) in GROUPS.items():
        for side in sides:
            yield pytest.param(name, side, id=f"{name}-{side}".replace(" ", "_"))


@pytest.mark.parametrize(("name", "side"), _cases())
def test_speed(benchmark: Any, name: str, side: str) -> None:
    """Time one side."""
    group, want = _group(name)
    assert list(group.sides) == list(GROUPS[name][1])
    benchmark.group = name
    with torch.inference_mode():
        got = want if side == next(iter(group.sides)) else group.sides[side]()
        assert group.agrees(got, want), f"{name} by {side} is wrong; nothing is timed"
        benchmark.pedantic(group.sides[side], rounds=5, warmup_rounds=1)
