"""What is computed of one scan and kept for all requests: the language model's prefix and SAM2's image features."""

from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, Any

from torch import Tensor

from medvl_sam2.engine.beside import Job
from medvl_sam2.engine.geometry import Volume
from medvl_sam2.engine.prompting import SlicePrompts
from medvl_sam2.engine.segmenter import ObjectSlices
from medvl_sam2.engine.timing import Stages
from medvl_sam2.engine.track_state import KeptFeatures
from medvl_sam2.model.processing import ScanArray

if TYPE_CHECKING:
    from medvl_sam2.engine.engine import MedVLEngine


class ScanWork:
    """The kept work of a scan, done when it is first needed; to be used with the engine's lock held.

    Args:
        engine: Owner of the model.
        volume: The scan.
    """

    def __init__(self, engine: "MedVLEngine", volume: Volume):
        self._engine = engine
        self._scan = ScanArray(volume.voxels, volume.slope, volume.intercept)
        self.transform = engine.processor.transform(self._scan)
        self._prefix: Any = None
        self._features: Job[KeptFeatures] | None = None

    @property
    def nbytes(self) -> int:
        """Memory that the kept work takes."""
        prefix = 0 if self._prefix is None else self._engine.language.prefix_bytes(self._prefix)
        features = None if self._features is None else self._features.finished
        return prefix + (0 if features is None else features.nbytes)

    def release(self) -> None:
        """Let go of everything."""
        self._prefix = self._features = None

    def prefix(self, stages: Stages) -> Any:
        """The language backend's prefix."""
        if self._prefix is None:
            engine = self._engine
            with stages.measure("vision"):
                visual = engine.visual_tokens(engine.processor.encoder_grid(self._scan, self.transform))
            with stages.measure("prefix"):
                self._prefix = engine.language.prefix(visual)
        return self._prefix

    def features(self, stages: Stages, cancel: Event | None = None) -> Job[KeptFeatures]:
        """SAM2's features of all slices; where there is a stream for it, their work begins here."""
        engine = self._engine
        if self._features is None or not self._features.is_usable:
            # What runs beside others may be waited for by several requests, so that none of them can call it off.
            stop = None if engine.beside.is_parallel else cancel

            def encode() -> KeptFeatures:
                with stages.measure("slices"):
                    return engine.segmenter.encode(
                        lambda start, stop: engine.processor.slice_images(self._scan, self.transform, start, stop),
                        self.transform.slices,
                        stop,
                    )

            self._features = engine.beside.start(encode)
        return self._features

    def by_text(self, hidden: Tensor, stages: Stages, cancel: Event | None = None) -> Job[list[ObjectSlices]]:
        """Objects of (B, E, H) [SEG] states."""
        embeddings = self._engine.embeddings(hidden)
        return self._masks(
            lambda features: self._engine.segmenter.by_text(features, embeddings, cancel), stages, cancel, embeddings
        )

    def by_prompts(
        self, marked: SlicePrompts, hidden: Tensor | None, stages: Stages, cancel: Event | None = None
    ) -> Job[ObjectSlices]:
        """An object marked by a user, and perhaps by a (E, H) [SEG] state."""
        engine = self._engine
        embeddings = None if hidden is None else engine.embeddings(hidden)[None]
        prompts = {index: prompt.to(engine.device) for index, prompt in marked.prompts.items()}
        return self._masks(
            lambda features: engine.segmenter.by_prompts(
                features, prompts, marked.start, embeddings, marked.extent, cancel
            ),
            stages,
            cancel,
            embeddings,
            list(prompts.values()),
        )

    def _masks(
        self, find: Callable[[KeptFeatures], Any], stages: Stages, cancel: Event | None, *inputs: Any
    ) -> Job[Any]:
        features = self.features(stages, cancel)

        def run() -> Any:
            # On the side of the work already, where they are done by now or are done now.
            encoded = features.result()
            with stages.measure("masks"):
                return find(encoded)

        return self._engine.beside.start(run, *inputs)
