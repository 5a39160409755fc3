"""Objects carried through a volume in one call: from a slice that all share, or each from its own."""

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from medvl_sam2.engine.runner import SliceRunner
from medvl_sam2.engine.track_state import Features
from medvl_sam2.engine.volume_track import Directions, VolumeTrack
from medvl_sam2.model.sam2 import Prompts, SliceFeatures


def follow(
    runner: SliceRunner,
    features: Features,
    prompts: Mapping[int, Prompts | None] | None = None,
    *,
    start: int,
    directions: Directions = "both",
    seg_embeddings: Tensor | None = None,
    **options: Any,
) -> VolumeTrack:
    """Segment B objects through a volume; their track, from which corrections go on.

    Args:
        runner: The model.
        features: All S slices.
        prompts: Prompts of the B objects by slice. When there are none, ``start`` is conditioned on the embeddings.
        start: Slice where the chains begin.
        directions: Which chains to run.
        seg_embeddings: (B, E, d) tokens given on every slice, such as the [SEG] vector.
        **options: Of `VolumeTrack`.

    Raises:
        ValueError: Neither prompts nor embeddings.
    """
    if not prompts and seg_embeddings is None:
        raise ValueError("propagate: expected prompts or seg_embeddings, got neither; say what to segment")
    track = VolumeTrack(runner, features, seg_embeddings=seg_embeddings, **options)
    for index, asked in (prompts or {start: None}).items():
        track.prompt(index, asked)
    track.run(start, directions)
    return track


def propagate(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """As `follow`; the counterpart of `model.sam2.propagate`.

    Returns:
        Logits (S, B, m, m) and object scores (S, B); slices not reached hold NO_OBJECT.
    """
    track = follow(*args, **options)
    return track.logits, track.scores


@torch.inference_mode()
def follow_each(
    runner: SliceRunner,
    features: Features,
    prompts: Prompts,
    *,
    starts: Sequence[int],
    seg_embeddings: Tensor | None = None,
    **options: Any,
) -> list[VolumeTrack]:
    """Segment B objects through a volume, each from a slice of its own, as one batch.

    Every object gives what `propagate` gives for it alone. The loop takes as many steps as the longest way through the
    volume, where one object after the other would take as many as all ways in a row.

    Args:
        runner: The model.
        features: All S slices.
        prompts: Of the B objects, on their starts.
        starts: Slice of each object where its chains begin.
        seg_embeddings: As in `follow`.
        **options: Of `VolumeTrack`.

    Returns:
        A track for each object, in order; a single one of all objects where they share one start.
    """
    if len(set(starts)) == 1:
        asked = {starts[0]: prompts}
        return [follow(runner, features, asked, start=starts[0], seg_embeddings=seg_embeddings, **options)]
    gate = options.get("gate_by_object_score")
    out = runner.sam2.step(
        SliceFeatures.cat([features[start] for start in starts]),
        prompts,
        None,
        is_conditioning=True,
        multimask=options.get("multimask"),
        encode_memory=False,
        gate_by_object_score=gate,
    )
    tracks = []
    for row, start in enumerate(starts):
        own = slice(row, row + 1)
        every = None if seg_embeddings is None else seg_embeddings[own]
        track = VolumeTrack(runner, features, seg_embeddings=every, **options)
        track.take(start, out, prompts.is_from_user, own)
        tracks.append(track)
    # All forward chains run together, and then all reverse ones where these read what the forward ones left.
    for lots in zip_longest(*(track.ways(start) for track, start in zip(tracks, starts)), fillvalue=()):
        tracks[0].loop.run(list(chain.from_iterable(lots)))
    return tracks
