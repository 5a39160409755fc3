"""Image features of a stack of slices, encoded in chunks that fit a memory budget, at once or as they are needed.

What is encoded at once stays on the device, or on page-locked memory of the host where it would crowd the device.
"""

from collections.abc import Callable
from threading import Event
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvl_sam2.engine.chunks import Chunks
from medvl_sam2.kernels.linear import linear
from medvl_sam2.model.sam2 import SAM2, SliceFeatures
from medvl_sam2.model.sam2.config import PATCH_STRIDE, SAM2Config

Images = Callable[[int, int], Tensor]
"""Gives slices [start, stop) as (n, 3, R, R), normalised."""

Place = Literal["auto", "device", "host"]

CPU_BUDGET = 128 << 20
CUDA_SHARE = 8
# Features that would take more than this part of what is free go to the host.
KEPT_SHARE = 2


def working_bytes(config: SAM2Config, itemsize: int) -> int:
    """What the image encoder holds at a time for one slice, nearly: the widest stage's tokens twelve times over."""
    return 12 * (config.image_size // PATCH_STRIDE) ** 2 * config.embed_dim * itemsize


def choose_chunk(config: SAM2Config, device: torch.device, dtype: torch.dtype, budget: int | None = None) -> int:
    """Slices to encode at a time, at least 1.

    Args:
        config: Sizes.
        device: Where.
        dtype: Of the weights.
        budget: Bytes for the encoder's activations; None takes 128 MiB on a CPU, where a larger batch gains nothing,
            and an eighth of the free memory on CUDA.
    """
    if budget is None:
        budget = torch.cuda.mem_get_info(device)[0] // CUDA_SHARE if device.type == "cuda" else CPU_BUDGET
    return max(1, min(64, budget // working_bytes(config, dtype.itemsize)))


def feature_bytes(config: SAM2Config, itemsize: int) -> int:
    """What the features of one slice take: a map at stride 16, and two finer ones of less depth."""
    return 4 * config.feature_size**2 * config.d_model * itemsize


def choose_place(
    config: SAM2Config, device: torch.device, dtype: torch.dtype, slices: int
) -> Literal["device", "host"]:
    """Where the features of so many slices are best kept."""
    if device.type != "cuda":
        return "device"
    free = torch.cuda.mem_get_info(device)[0]
    return "host" if slices * feature_bytes(config, dtype.itemsize) > free // KEPT_SHARE else "device"


class FoldedEncoder:
    """SAM2's image encoder with each finest level's two 1x1 convolutions as one, in float32 and then rounded once.

    The levels at strides 4 and 8 are read by the mask decoder alone, through conv_s0 and conv_s1.

    Args:
        sam2: In evaluation mode; not to be changed afterwards.
    """

    @torch.inference_mode()
    def __init__(self, sam2: SAM2) -> None:
        self._trunk = sam2.image_encoder.trunk
        coarse, level16, level8, level4 = (_matrix(step.conv) for step in sam2.image_encoder.neck.convs)
        decoder = sam2.sam_mask_decoder
        self._levels = (_chained(level4, decoder.conv_s0), _chained(level8, decoder.conv_s1), level16, coarse)

    def __call__(self, images: Tensor) -> SliceFeatures:
        """As `SAM2.encode_images`."""
        maps = self._trunk(images.contiguous(memory_format=torch.channels_last))
        fine, middle, vision, coarse = (
            linear(x.permute(0, 2, 3, 1), *level).permute(0, 3, 1, 2) for x, level in zip(maps, self._levels)
        )
        return SliceFeatures(vision + F.interpolate(coarse, scale_factor=2, mode="nearest"), (fine, middle))


def _matrix(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    return conv.weight.flatten(1), conv.bias


def _chained(first: tuple[Tensor, Tensor], second: nn.Conv2d) -> tuple[Tensor, Tensor]:
    weight, bias = (x.float() for x in _matrix(second))
    dtype = second.weight.dtype
    return (weight @ first[0].float()).to(dtype), (weight @ first[1].float() + bias).to(dtype)


class SliceEncoder:
    """Encodes chunks of slices; where the memory does not suffice it halves the chunk, says so once, and goes on.

    Args:
        sam2: In evaluation mode.
        chunk: Slices at a time; None decides by the memory.
    """

    def __init__(self, sam2: SAM2, chunk: int | None = None) -> None:
        weight = sam2.no_mem_embed
        self.sam2 = sam2
        self._encode = FoldedEncoder(sam2)
        self.chunks = Chunks(chunk or choose_chunk(sam2.config, weight.device, weight.dtype), "encoding")

    def encode(self, images: Images, start: int, stop: int, cancel: Event | None = None) -> SliceFeatures:
        """Image features of slices [start, stop).

        Raises:
            Cancelled: The event was set.
        """
        parts = self.chunks.run(lambda start, stop: self._encoded(images, start, stop), start, stop, cancel)
        return parts[0] if len(parts) == 1 else SliceFeatures.cat(parts)

    def encode_to_host(self, images: Images, slices: int, cancel: Event | None = None) -> "HostFeatures":
        """Image features of all slices; each chunk leaves the device when it is done.

        Raises:
            Cancelled: The event was set.
        """
        weight = self.sam2.no_mem_embed
        kept = HostFeatures(self.sam2.config, slices, weight.device, weight.dtype)
        self.chunks.run(lambda start, stop: kept.put(start, self._encoded(images, start, stop)), 0, slices, cancel)
        return kept

    def _encoded(self, images: Images, start: int, stop: int) -> SliceFeatures:
        weight = self.sam2.no_mem_embed
        return self._encode(images(start, stop).to(weight.device, weight.dtype))


class HostFeatures:
    """Features of a stack on the host, page-locked for a GPU, to which what is asked for is copied.

    Takes the place of `SliceFeatures`. The copies are ordered by the stream of whoever puts or asks.

    Args:
        config: Sizes.
        slices: How many there are.
        device: Where they are made and used.
        dtype: Of the features.
    """

    def __init__(self, config: SAM2Config, slices: int, device: torch.device, dtype: torch.dtype) -> None:
        side, depth, pinned = config.feature_size, config.d_model, device.type == "cuda"
        shapes = ((side, side, depth), (4 * side, 4 * side, depth // 8), (2 * side, 2 * side, depth // 4))
        # Channels last, as they are made, so that a copy is one piece.
        maps = (torch.empty((slices, *shape), dtype=dtype, pin_memory=pinned).permute(0, 3, 1, 2) for shape in shapes)
        vision, *high_res = maps
        self._kept, self._device = SliceFeatures(vision, tuple(high_res)), device

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int | slice) -> SliceFeatures:
        """One slice, or a range of slices, on the device."""
        return self._kept[index].to(self._device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Memory taken on the host, in bytes."""
        return self._kept.nbytes

    def put(self, start: int, features: SliceFeatures) -> None:
        """Keep the features of the slices from `start` on."""
        part = self._kept[start : start + len(features)]
        for mine, new in zip((part.vision, *part.high_res), (features.vision, *features.high_res)):
            mine.copy_(new, non_blocking=True)


class LazyFeatures:
    """Features of a stack that are encoded when they are asked for; the range asked for last is kept.

    Takes the place of `SliceFeatures` where the features of all slices would not fit; a chain of slices asks for each
    once.

    Args:
        encoder: Encodes the chunks.
        images: Source of the slices.
        slices: How many there are.
    """

    def __init__(self, encoder: SliceEncoder, images: Images, slices: int) -> None:
        self._encoder, self._images, self._slices = encoder, images, slices
        self._span, self._last = range(0), None

    def __len__(self) -> int:
        return self._slices

    def __getitem__(self, index: int | slice) -> SliceFeatures:
        """Encode one slice, or a range of slices."""
        if isinstance(index, int):
            index = slice(range(self._slices)[index], range(self._slices)[index] + 1)
        start, stop, step = index.indices(self._slices)
        if step != 1:
            raise ValueError(f"slices: expected a range without a step, got {index}; take them one by one")
        if self._last is None or not (start in self._span and stop - 1 in self._span):
            self._last = None
            self._last, self._span = self._encoder.encode(self._images, start, stop), range(start, stop)
        return self._last[start - self._span.start : stop - self._span.start]
