"""What is computed of one scan and kept for requests to come: the LLM's prefix, SAM2's image features, objects."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from threading import Event
from typing import TYPE_CHECKING, Any

from torch import Tensor

from medvl_sam2.engine.beside import Job
from medvl_sam2.engine.geometry import Volume
from medvl_sam2.engine.prompting import SlicePrompts
from medvl_sam2.engine.segmenter import Followed, ObjectSlices
from medvl_sam2.engine.timing import Stages
from medvl_sam2.engine.track_state import KeptFeatures
from medvl_sam2.model.processing import ScanArray

if TYPE_CHECKING:
    from medvl_sam2.engine.engine import MedVLEngine

# Objects of a scan that corrections can go on from, the ones used last.
MAX_FOLLOWED = 16


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
        self._followed: OrderedDict[str, Followed] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory that the kept work takes."""
        prefix = 0 if self._prefix is None else self._engine.language.prefix_bytes(self._prefix)
        features = None if self._features is None else self._features.finished
        tracks = sum(followed.track.nbytes for followed in self._followed.values())
        return prefix + (0 if features is None else features.nbytes) + tracks

    def release(self) -> None:
        """Let go of everything."""
        self._prefix = self._features = None
        self._followed.clear()

    def prefix(self, stages: Stages) -> Any:
        """The language backend's prefix."""
        if self._prefix is None:
            engine = self._engine
            with stages.measure("vision"):
                grid = engine.processor.encoder_grid(self._scan, self.transform, engine.device)
                visual = engine.visual_tokens(grid)
            with stages.measure("prefix"):
                self._prefix = engine.language.prefix(visual)
        return self._prefix

    def features(self, stages: Stages, cancel: Event | None = None) -> Job[KeptFeatures]:
        """SAM2's features of all slices; where there is a stream for it, their work begins here."""
        engine = self._engine
        if self._features is None or not self._features.is_usable:
            # What runs beside others may be waited for by several requests, so that none of them can call it off.
            stop = None if engine.beside.is_parallel else cancel

            def images(start: int, stop: int) -> Tensor:
                return engine.processor.slice_images(self._scan, self.transform, start, stop, engine.device)

            def encode() -> KeptFeatures:
                with stages.measure("slices"):
                    return engine.segmenter.encode(images, self.transform.slices, stop)

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

    def keep(self, identity: str, followed: Followed) -> None:
        """Keep what corrections of a mask go on from."""
        features = None if self._features is None else self._features.finished
        # A track would hold on to features that were let go in the meantime.
        if followed.track.features is features:
            self._followed[identity] = followed
            if len(self._followed) > MAX_FOLLOWED:
                self._followed.popitem(last=False)

    def correct(
        self,
        identity: str,
        marked: SlicePrompts,
        clicked: Collection[int],
        stages: Stages,
        cancel: Event | None = None,
    ) -> Job[ObjectSlices] | None:
        """A mask's object after further clicks; None where it is not kept.

        Args:
            identity: Of the mask, as in `keep`.
            marked: All that the user marked.
            clicked: Slices with new clicks.
            stages: Of the request.
            cancel: As in `by_prompts`.
        """
        followed = self._followed.get(identity)
        if followed is None:
            return None
        self._followed.move_to_end(identity)
        engine = self._engine
        prompts = {index: prompt.to(engine.device) for index, prompt in marked.prompts.items()}
        return self._masks(
            lambda _: engine.segmenter.correct(followed, prompts, clicked, marked.extent, cancel),
            stages,
            cancel,
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
