"""One scan, encoded once: every further question, click or organ reuses what is there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medvl_sam2.engine.geometry import InputError, Space, Volume
from medvl_sam2.engine.prompting import Box, Point, SlicePrompts, slice_prompts
from medvl_sam2.engine.segmentation import Segmentation
from medvl_sam2.engine.segmenter import ObjectSlices, union
from medvl_sam2.engine.text import TextStream, chosen, mask_name, requested
from medvl_sam2.engine.timing import Stages
from medvl_sam2.model.processing import ScanArray
from medvl_sam2.model.prompts import ABSENT_ANSWER, REPORT_REQUEST, SEGMENT_ANSWER, with_choices
from medvl_sam2.model.sam2 import SliceFeatures

if TYPE_CHECKING:
    from medvl_sam2.engine.engine import MedVLEngine

MAX_TOKENS = 512
# Tokens of an answer that names several objects.
MAX_PARTS = 64


@dataclass(frozen=True)
class Answer:
    """Text that the model wrote.

    Attributes:
        text: Without special tokens.
        choice: Index of the chosen answer of a multiple-choice question, else None.
        tokens: Tokens generated.
        timings: Seconds per stage of this request.
    """

    text: str
    choice: int | None = None
    tokens: int = 0
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatEvent:
    """A piece of an answer as it comes: some text, or a mask.

    Attributes:
        text: What became certain since the last event.
        segmentation: A mask, after the text that led to it.
        finish: "stop" or "length" on the last event (which may carry text too), else None.
        tokens: Tokens generated so far.
    """

    text: str = ""
    segmentation: Segmentation | None = None
    finish: str | None = None
    tokens: int = 0


class VolumeSession:
    """Conversation with the model about one scan.

    Made by `MedVLEngine.open`. Work on the scan happens at the first request that needs it and is kept until the
    engine's cache lets it go; a session that was let go still works, and encodes again.

    Args:
        engine: Owner of the model.
        volume: The scan.
    """

    def __init__(self, engine: "MedVLEngine", volume: Volume):
        self.volume = volume
        self._engine = engine
        self.stages = Stages(engine.device)
        with self.stages.measure("crop"):
            self._scan = ScanArray(volume.voxels, volume.slope, volume.intercept)
            self.transform = engine.processor.transform(self._scan)
        self._prefix: Any = None
        self._features: SliceFeatures | None = None

    @property
    def nbytes(self) -> int:
        """Memory that the kept work takes, the scan's own voxels aside."""
        prefix = 0 if self._prefix is None else self._engine.language.prefix_bytes(self._prefix)
        return prefix + (0 if self._features is None else self._features.nbytes)

    @property
    def prefix_tokens(self) -> int:
        """Tokens ahead of every question: the system message and the scan."""
        return len(self._engine.chat.prefix())

    def encode(self) -> "VolumeSession":
        """Do all the work that depends on the scan alone, so that later requests are quick."""
        with self._engine.using(self):
            self._language_prefix()
            self._slice_features()
        return self

    def release(self) -> None:
        """Let go of the kept work."""
        with self._engine.lock:
            self._prefix = self._features = None

    def report(self, *, max_tokens: int = MAX_TOKENS, cancel: Event | None = None) -> Answer:
        """Write a report of the scan.

        Args:
            max_tokens: Length limit.
            cancel: Ends the report early once set.
        """
        return self.ask(REPORT_REQUEST, max_tokens=max_tokens, cancel=cancel)

    def ask(
        self,
        question: str,
        choices: Sequence[str] | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        cancel: Event | None = None,
    ) -> Answer:
        """Answer a question about the scan.

        Args:
            question: In words.
            choices: For a multiple-choice question.
            max_tokens: Length limit.
            cancel: Ends the answer early once set.

        Raises:
            InputError: The question is empty or too long.
        """
        before = dict(self.stages)
        prompt = with_choices(question, tuple(choices)) if choices else question
        stream = TextStream(self._engine.tokenizer)
        for step in self._steps(prompt, (), max_tokens, cancel):
            stream.push(step.token)
        text = stream.text.strip()
        choice = chosen(text, choices) if choices else None
        return Answer(text, choice, stream.tokens, self.stages.since(before))

    def chat(
        self,
        text: str,
        *,
        history: Sequence[tuple[str, str]] = (),
        max_tokens: int = MAX_TOKENS,
        cancel: Event | None = None,
    ) -> Iterator[ChatEvent]:
        """Answer with text and masks as they come.

        Args:
            text: What the user says.
            history: Earlier turns (user, answer) that the model should know of.
            max_tokens: Length limit.
            cancel: Ends the answer early once set.

        Raises:
            InputError: The text is empty or too long.
        """
        stream = TextStream(self._engine.tokenizer)
        tokens = 0
        for step in self._steps(text, history, max_tokens, cancel):
            tokens += 1
            if step.hidden is None:
                if piece := stream.push(step.token):
                    yield ChatEvent(text=piece, tokens=tokens)
                continue
            with self._engine.using(self):
                before = dict(self.stages)
                (shown,) = self._by_text(step.hidden[None, None])
                name = mask_name(stream.text, text)
                mask = self._segmentation(name, stream.text.strip(), shown, self.stages.since(before))
            yield ChatEvent(segmentation=mask, tokens=tokens)
        room = self._engine.room - len(self.prompt_ids(text, history))
        yield ChatEvent(
            text=stream.flush(), finish="stop" if tokens < min(max_tokens, room) else "length", tokens=tokens
        )

    def prompt_ids(self, text: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Tokens of a conversation after the scan's prefix, up to where the answer begins.

        Args:
            text: What the user says.
            history: Earlier turns (user, answer).

        Raises:
            InputError: The text is empty or too long.
        """
        chat = self._engine.chat
        ids: list[int] = []
        for number, (question, answer) in enumerate(history):
            ids += [*chat.question(question, first=number == 0), *chat.answer(answer)]
        return self._checked(ids + chat.question(text, first=not history), text)

    def segment(
        self,
        target: str | None = None,
        *,
        points: Sequence[Point] | None = None,
        box: Box | None = None,
        space: Space = "voxel",
    ) -> Segmentation:
        """Segment one object.

        Args:
            target: Name ("left kidney"), description, or a whole request that ends in punctuation. None with points
                or a box: whatever is marked.
            points: (i, j, k) or (i, j, k, label); label +1 marks the object (default), -1 the background.
            box: (i0, j0, k0, i1, j1, k1), lower corner first.
            space: Of points and box: "voxel" (the file's own index), "ras" or "lps" millimetres.

        Returns:
            The mask on the scan's own grid. Without points or box the model may answer that the target is absent.

        Raises:
            InputError: Nothing to go by, a point outside the volume, or a box upside down.
        """
        if points is None and box is None:
            if target is None:
                raise InputError("target: expected a name, a description, points or a box, got nothing to segment")
            return self.segment_all([target])[0]
        prompts = slice_prompts(
            self.volume, self.transform, self._engine.processor.image_size, points or None, box, space
        )
        return self._segment_marked(target, prompts)

    def segment_all(self, targets: Sequence[str]) -> list[Segmentation]:
        """Segment several objects by name or description, in one go.

        Args:
            targets: As in `segment`. One that the model takes for several objects ("kidneys") gives their union.
        """
        if not targets:
            return []
        before = dict(self.stages)
        with self._engine.using(self):
            names, forced = self._force(targets)
            here = [i for i, result in enumerate(forced) if result.margin > 0]
            objects = dict(zip(here, self._by_text(torch.stack([forced[i].hidden for i in here])))) if here else {}
            texts = [
                SEGMENT_ANSWER if i in objects else ABSENT_ANSWER.format(name=name) for i, name in enumerate(names)
            ]
            own = {self._engine.chat.answer(text)[0] for text in (SEGMENT_ANSWER, ABSENT_ANSWER)}
            for i, result in enumerate(forced):
                # The model would begin with something else: with a name, when it sees several objects in the request.
                if result.first not in own and (parts := self._own_answer(targets[i])):
                    texts[i], objects[i] = parts
        timings = self.stages.since(before)
        return [self._segmentation(name, texts[i], objects.get(i), timings) for i, name in enumerate(names)]

    def _own_answer(self, target: str) -> tuple[str, ObjectSlices] | None:
        """The model's own answer to a request and its objects as one; None unless there are several."""
        stream = TextStream(self._engine.tokenizer)
        states = []
        for step in self._steps(requested(target)[1], (), MAX_PARTS, None):
            stream.push(step.token)
            states += [] if step.hidden is None else [step.hidden]
        if len(states) < 2:
            return None
        return stream.text.strip(), union(self._by_text(torch.stack(states)[:, None]))

    def _segment_marked(self, target: str | None, marked: SlicePrompts) -> Segmentation:
        before = dict(self.stages)
        if target is None and marked.start is None:
            raise InputError("points: expected one on the object (label +1) where no name is given; add one")
        with self._engine.using(self):
            embeddings = None
            if target is not None:
                # The user points at it, so the model is not asked whether it is there.
                (target,), (forced,) = self._force([target])
                embeddings = self._engine.embeddings(forced.hidden)[None]
            features = self._slice_features()
            with self.stages.measure("masks"):
                prompts = {i: p.to(self._engine.device) for i, p in marked.prompts.items()}
                shown = self._engine.segmenter.by_prompts(features, prompts, marked.start, embeddings, marked.extent)
        return self._segmentation(target or "object", SEGMENT_ANSWER, shown, self.stages.since(before))

    def _force(self, targets: Sequence[str]) -> tuple[list[str], list[Any]]:
        """Names of the targets, and the [SEG] states of the plain answer to each."""
        chat = self._engine.chat
        names, questions = zip(*(requested(target) for target in targets))
        prefix = self._language_prefix()
        with self.stages.measure("language"):
            forced = self._engine.language.forced(
                prefix,
                [self._checked(chat.question(question), question) for question in questions],
                chat.answer(SEGMENT_ANSWER),
                [chat.answer(ABSENT_ANSWER.format(name=name)) for name in names],
            )
        return list(names), forced

    def _by_text(self, hidden: Tensor) -> list[ObjectSlices]:
        """(B, E, H) states -> objects."""
        features = self._slice_features()
        with self.stages.measure("masks"):
            return self._engine.segmenter.by_text(features, self._engine.embeddings(hidden))

    def _segmentation(
        self, name: str, text: str, shown: ObjectSlices | None, timings: dict[str, float]
    ) -> Segmentation:
        common = {"name": name, "volume": self.volume, "text": text, "transform": self.transform, "timings": timings}
        if shown is None:
            return Segmentation(absent=True, **common)
        scores = [round(score, 4) for score in shown.scores.float().tolist()]
        return Segmentation(
            absent=False, logits=shown.logits, present=shown.present, scores=scores, start=shown.start, **common
        )

    def _steps(
        self, text: str, history: Sequence[tuple[str, str]], max_tokens: int, cancel: Event | None
    ) -> Iterator[Any]:
        ids = self.prompt_ids(text, history)
        with self._engine.using(self):
            prefix = self._language_prefix()
        steps = self._engine.language.generate(
            prefix, ids, max_tokens=min(max_tokens, self._engine.room - len(ids)), cancel=cancel
        )
        while True:
            # The lock is held for a token at a time, so that a slow reader of the stream blocks nobody.
            with self._engine.lock, self.stages.measure("language"):
                step = next(steps, None)
            if step is None:
                return
            yield step

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if not text.strip():
            raise InputError("text: expected a question or a request, got nothing; write one")
        if len(ids) >= self._engine.room:
            raise InputError(f"text: {len(ids)} tokens, but there is room for {self._engine.room - 1}; shorten it")
        return ids

    def _language_prefix(self) -> Any:
        if self._prefix is None:
            with self.stages.measure("vision"):
                grid = self._engine.processor.encoder_grid(self._scan, self.transform)
                visual = self._engine.visual_tokens(grid)
            with self.stages.measure("prefix"):
                self._prefix = self._engine.language.prefix(visual)
        return self._prefix

    def _slice_features(self) -> SliceFeatures:
        if self._features is None:
            with self.stages.measure("slices"):
                self._features = self._engine.segmenter.encode(
                    lambda start, stop: self._engine.processor.slice_images(self._scan, self.transform, start, stop),
                    self.transform.slices,
                )
        return self._features
