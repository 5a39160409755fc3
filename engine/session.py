"""One scan, encoded once: every further question, click or organ reuses what is there."""

from collections import deque
from collections.abc import Iterator, Sequence
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medvl_sam2.engine.answers import Answer, ChatEvent
from medvl_sam2.engine.beside import Job
from medvl_sam2.engine.cancelling import Linked, check
from medvl_sam2.engine.geometry import InputError, Space, Volume
from medvl_sam2.engine.prompting import Box, Point, slice_prompts
from medvl_sam2.engine.scan_work import ScanWork
from medvl_sam2.engine.segmentation import Asked, Segmentation
from medvl_sam2.engine.segmenter import ObjectSlices, union
from medvl_sam2.engine.text import TextStream, mask_name, requested
from medvl_sam2.engine.timing import Stages
from medvl_sam2.model.choices import chosen
from medvl_sam2.model.prompts import ABSENT_ANSWER, REPORT_REQUEST, SEGMENT_ANSWER, with_choices

if TYPE_CHECKING:
    from medvl_sam2.engine.engine import MedVLEngine

MAX_TOKENS = 512
# Tokens of an answer that names several objects.
MAX_PARTS = 64


class VolumeSession:
    """Conversation with the model about one scan.

    Made by `MedVLEngine.open`. Work on the scan happens at the first request that needs it and is kept until the
    engine's cache lets it go; a session that was let go still works, and encodes again. Safe from several threads.

    Args:
        engine: Owner of the model.
        volume: The scan.
    """

    def __init__(self, engine: "MedVLEngine", volume: Volume):
        self.volume = volume
        self._engine = engine
        self.stages = Stages(engine.device)
        with self.stages.measure("crop"):
            self._work = ScanWork(engine, volume)
        self.transform = self._work.transform

    @property
    def nbytes(self) -> int:
        """Memory that the kept work takes, the scan's own voxels aside."""
        return self._work.nbytes

    @property
    def prefix_tokens(self) -> int:
        """Tokens ahead of every question: the system message and the scan."""
        return len(self._engine.chat.prefix())

    def encode(self) -> "VolumeSession":
        """Do all the work that depends on the scan alone, so that later requests are quick."""
        with self._engine.using(self):
            features = self._work.features(self.stages)
            self._work.prefix(self.stages)
            features.result()
        return self

    def release(self) -> None:
        """Let go of the kept work."""
        with self._engine.lock:
            self._work.release()

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
            InputError: The question is empty or too long, or has too many choices.
        """
        return self.ask_all([question], [choices], max_tokens=max_tokens, cancel=cancel)[0]

    def ask_all(
        self,
        questions: Sequence[str],
        choices: Sequence[Sequence[str] | None] | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        cancel: Event | None = None,
    ) -> list[Answer]:
        """Answer several questions that do not know of each other, decoded together.

        Args:
            questions: In words.
            choices: Of each question; None where it is not multiple-choice, or where none is.
            max_tokens: Length limit of each answer.
            cancel: Ends the answers early once set.

        Returns:
            What `ask` gives for each.

        Raises:
            InputError: A question is empty or too long, has too many choices, or is not in a list.
        """
        _refuse_text("questions", questions, "ask")
        stages, choices = self.stages.part(), choices or [None] * len(questions)
        texts = [_with_choices(q, c) if c else q for q, c in zip(questions, choices, strict=True)]
        ids = [self.prompt_ids(text) for text in texts]
        streams = [TextStream(self._engine.tokenizer) for _ in ids]
        size = self._engine.language.batch
        for first in range(0, len(ids), size):
            own = streams[first : first + size]
            for steps in self._rounds(ids[first : first + size], max_tokens, cancel, stages):
                for stream, step in zip(own, steps):
                    if step is not None:
                        stream.push(step.token)
        timings = dict(stages)
        answers = []
        for stream, own in zip(streams, choices):
            stream.flush()
            text = stream.text.strip()
            answers.append(Answer(text, chosen(text, own) if own else None, stream.tokens, timings))
        return answers

    def chat(
        self,
        text: str,
        *,
        history: Sequence[tuple[str, str]] = (),
        max_tokens: int = MAX_TOKENS,
        cancel: Event | None = None,
    ) -> Iterator[ChatEvent]:
        """Answer with text and masks as they come.

        On a GPU a mask is computed while the text goes on, and comes when it is done.

        Args:
            text: What the user says.
            history: Earlier turns (user, answer) that the model should know of.
            max_tokens: Length limit.
            cancel: Ends the answer early once set.

        Raises:
            InputError: The text is empty or too long.
            Cancelled: The event was set while a mask was computed.
        """
        # A listener who leaves ends his own masks, not what else the caller's event may stand for.
        stages, left = self.stages.part(), Linked(cancel)
        stream, tokens = TextStream(self._engine.tokenizer), 0
        ids = self.prompt_ids(text, history)
        pending: deque[tuple[str, str, Job]] = deque()
        if self._engine.beside.is_parallel:
            # On a stream of its own it costs the text little, and the first [SEG] finds it done.
            with self._engine.using(self):
                self._work.features(stages)
        try:
            for (step,) in self._rounds([ids], max_tokens, cancel, stages):
                tokens += 1
                if step.hidden is not None:
                    with self._engine.using(self):
                        job = self._work.by_text(step.hidden[None, None], stages, left)
                    pending.append((mask_name(stream.text, text), stream.text.strip(), job))
                elif piece := stream.push(step.token):
                    yield ChatEvent(text=piece, tokens=tokens, timings=stages)
                while pending and pending[0][2].is_ready:
                    yield ChatEvent(segmentation=self._found(*pending.popleft(), stages), tokens=tokens, timings=stages)
            while pending:
                pending[0][2].wait()
                yield ChatEvent(segmentation=self._found(*pending.popleft(), stages), tokens=tokens, timings=stages)
        finally:
            if pending:
                # Whoever listened has left.
                left.set()
        finish = "stop" if tokens < min(max_tokens, self._engine.room - len(ids)) else "length"
        if left.is_set():
            finish = "cancelled"
        yield ChatEvent(text=stream.flush(), finish=finish, tokens=tokens, timings=stages)

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
        cancel: Event | None = None,
    ) -> Segmentation:
        """Segment one object.

        Args:
            target: Name ("left kidney"), description, or a whole request that ends in punctuation. None with points
                or a box: whatever is marked.
            points: (i, j, k) or (i, j, k, label); label +1 marks the object (default), -1 the background.
            box: (i0, j0, k0, i1, j1, k1), lower corner first.
            space: Of points and box: "voxel" (the file's own index), "ras" or "lps" millimetres.
            cancel: Ends the work before the next slice once set.

        Returns:
            The mask on the scan's own grid. Without points or box the model may answer that the target is absent.

        Raises:
            InputError: Nothing to go by, a point outside the volume, or a box upside down.
            Cancelled: The event was set.
        """
        # No points are no mark: the model is asked whether the target is there.
        points = None if points is None or not len(points) else list(points)
        if points is None and box is None:
            if target is None:
                raise InputError("target: expected a name, a description, points or a box, got nothing to segment")
            return self.segment_all([target], cancel=cancel)[0]
        image_size = self._engine.processor.image_size
        marked = slice_prompts(self.volume, self.transform, image_size, points or None, box, space)
        if target is None and marked.start is None:
            raise InputError("points: expected one on the object (label +1) where no name is given; add one")
        name, stages, hidden = "object", self.stages.part(), None
        with self._engine.using(self):
            check(cancel)
            self._work.features(stages, cancel)
            if target is not None:
                # The user points at it, so the model is not asked whether it is there.
                (name,), (forced,) = self._force([target], stages)
                hidden = forced.hidden
            shown = self._work.by_prompts(marked, hidden, stages, cancel).result()
            asked = Asked(target, _numbers(points or []), None if box is None else tuple(map(float, box)), space)
            return self._segmentation(name, asked, SEGMENT_ANSWER, shown, stages)

    def refine(
        self,
        found: Segmentation | Asked,
        points: Sequence[Point],
        *,
        space: Space | None = None,
        cancel: Event | None = None,
    ) -> Segmentation:
        """Correct a mask by further clicks, on any slices.

        A slice with new clicks is segmented again, with its mask as a hint, and then only slices that follow from it.
        Where the scan's work has been let go since, the mask was made without memory, is older than the last ones that
        are kept, joins several objects, or came with others that began on the same slice, it is segmented again from
        all clicks, as `segment` would.

        Args:
            found: A mask of this scan, or its `asked`; it stays as it is.
            points: New clicks: (i, j, k) or (i, j, k, label); label +1 marks the object (default), -1 the background.
            space: Of the points; None takes the one of the request. It must be that one if there were points or a box.
            cancel: Ends the work before the next slice once set.

        Returns:
            The mask on the scan's own grid, which can be refined in turn.

        Raises:
            InputError: No point, one outside the volume, or in another space than those before.
            Cancelled: The event was set.
        """
        asked = found.asked if isinstance(found, Segmentation) else found
        if len(points) == 0:
            raise InputError("points: expected a click or more, got none; give (i, j, k, label)")
        if space not in (None, asked.space) and (asked.points or asked.box is not None):
            raise InputError(f"space: expected {asked.space!r} as in the mask, got {space!r}; convert the points")
        space, stages = space or asked.space, self.stages.part()
        every = (*asked.points, *_numbers(points))
        common = (self.volume, self.transform, self._engine.processor.image_size)
        clicked = slice_prompts(*common, points, None, space).prompts
        marked = slice_prompts(*common, every, asked.box, space)
        with self._engine.using(self):
            check(cancel)
            job = self._work.correct(asked.id, marked, list(clicked), stages, cancel)
            if job is not None:
                asked = Asked(asked.target, every, asked.box, space)
                name = requested(asked.target)[0] if asked.target else "object"
                return self._segmentation(name, asked, SEGMENT_ANSWER, job.result(), stages)
        return self.segment(asked.target, points=every, box=asked.box, space=space, cancel=cancel)

    def segment_all(self, targets: Sequence[str], *, cancel: Event | None = None) -> list[Segmentation]:
        """Segment several objects by name or description, as one batch.

        Args:
            targets: As in `segment`. One that the model takes for several objects ("kidneys") gives their union.
            cancel: Ends the work before the next slice once set.

        Raises:
            InputError: A target is empty or too long, or a bare text is given instead of a list.
            Cancelled: The event was set.
        """
        _refuse_text("targets", targets, "segment")
        if not targets:
            return []
        stages = self.stages.part()
        with self._engine.using(self):
            check(cancel)
            self._work.features(stages, cancel)
            names, forced = self._force(targets, stages)
            check(cancel)
            here = [i for i, result in enumerate(forced) if result.margin > 0]
            objects: dict[int, ObjectSlices] = {}
            if here:
                states = torch.stack([forced[i].hidden for i in here])
                objects = dict(zip(here, self._by_text(states, stages, cancel)))
            texts = [
                SEGMENT_ANSWER if i in objects else ABSENT_ANSWER.format(name=name) for i, name in enumerate(names)
            ]
            own = {self._engine.chat.answer(text)[0] for text in (SEGMENT_ANSWER, ABSENT_ANSWER)}
            for i, result in enumerate(forced):
                # The model would begin with something else: with a name, when it sees several objects in the request.
                if result.first not in own and (parts := self._own_answer(targets[i], stages, cancel)):
                    texts[i], objects[i] = parts
            return [
                self._segmentation(name, Asked(targets[i]), texts[i], objects.get(i), stages)
                for i, name in enumerate(names)
            ]

    def _own_answer(self, target: str, stages: Stages, cancel: Event | None) -> tuple[str, ObjectSlices] | None:
        """The model's own answer to a request and its objects as one; None unless there are several."""
        stream = TextStream(self._engine.tokenizer)
        states = []
        for (step,) in self._rounds([self.prompt_ids(requested(target)[1])], MAX_PARTS, cancel, stages):
            stream.push(step.token)
            states += [] if step.hidden is None else [step.hidden]
        check(cancel)
        if len(states) < 2:
            return None
        return stream.text.strip(), union(self._by_text(torch.stack(states)[:, None], stages, cancel))

    def _force(self, targets: Sequence[str], stages: Stages) -> tuple[list[str], list[Any]]:
        """Names of the targets, and the [SEG] states of the plain answer to each."""
        chat = self._engine.chat
        names, questions = zip(*(requested(target) for target in targets))
        ids = [self.prompt_ids(question) for question in questions]
        prefix = self._work.prefix(stages)
        with stages.measure("language"):
            forced = self._engine.language.forced(
                prefix,
                ids,
                chat.answer(SEGMENT_ANSWER),
                [chat.answer(ABSENT_ANSWER.format(name=name)) for name in names],
            )
        return list(names), forced

    def _by_text(self, hidden: Tensor, stages: Stages, cancel: Event | None = None) -> list[ObjectSlices]:
        """(B, E, H) states -> objects."""
        return self._work.by_text(hidden, stages, cancel).result()

    def _found(self, name: str, text: str, job: Job[list[ObjectSlices]], stages: Stages) -> Segmentation:
        """The one object of a job that is ready."""
        with self._engine.using(self):
            (shown,) = job.result()
            return self._segmentation(name, Asked(name), text, shown, stages)

    def _segmentation(
        self, name: str, asked: Asked, text: str, shown: ObjectSlices | None, stages: Stages
    ) -> Segmentation:
        common = {"name": name, "volume": self.volume, "text": text, "transform": self.transform, "asked": asked}
        if shown is None:
            return Segmentation(absent=True, timings=dict(stages), **common)
        if shown.followed is not None:
            self._work.keep(asked.id, shown.followed)
        scores = [round(score, 4) for score in shown.scores.float().tolist()]
        return Segmentation(
            absent=False,
            logits=shown.logits,
            present=shown.present,
            scores=scores,
            start=shown.start,
            timings=dict(stages),
            **common,
        )

    def _rounds(
        self, ids: Sequence[Sequence[int]], max_tokens: int, cancel: Event | None, stages: Stages
    ) -> Iterator[list[Any]]:
        """The answers to questions token by token, side by side."""
        engine = self._engine
        with engine.using(self):
            prefix = self._work.prefix(stages)
        limits = [min(max_tokens, engine.room - len(own)) for own in ids]
        rounds = engine.language.generate_all(prefix, ids, max_tokens=limits, cancel=cancel)
        try:
            while True:
                # The lock is held for a token at a time, so that a slow reader of the stream blocks nobody.
                with engine.lock, stages.measure("language"):
                    steps = next(rounds, None)
                if steps is None:
                    return
                yield steps
        finally:
            with engine.lock:
                rounds.close()

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if not text.strip():
            raise InputError("text: expected a question or a request, got nothing; write one")
        if len(ids) >= self._engine.room:
            raise InputError(f"text: {len(ids)} tokens, but there is room for {self._engine.room - 1}; shorten it")
        return ids


def _refuse_text(name: str, values: Sequence[str], single: str) -> None:
    """A text is a sequence of texts too: of its letters."""
    if isinstance(values, str):
        raise InputError(f"{name}: expected a list of texts, got {values!r}; give [{values!r}], or call {single}")


def _with_choices(question: str, choices: Sequence[str]) -> str:
    if isinstance(choices, str):
        raise InputError(f"choices: expected a list of texts, got {choices!r}; give one text for each choice")
    try:
        return with_choices(question, tuple(choices))
    except ValueError as error:
        raise InputError(str(error)) from error


def _numbers(points: Sequence[Point]) -> tuple[tuple[float, ...], ...]:
    """Points as a mask remembers them, which may be written to a file."""
    return tuple(tuple(float(value) for value in point) for point in points)
