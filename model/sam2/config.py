"""Sizes and switches of the SAM2 part: the official variants, and a micro one that trains on a laptop."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

PATCH_STRIDE = 4
FEATURE_STRIDE = 16

_HIERA = {
    "tiny": {"embed_dim": 96, "num_heads": 1, "stages": (1, 2, 7, 2), "global_blocks": (5, 7, 9)},
    "small": {"embed_dim": 96, "num_heads": 1, "stages": (1, 2, 11, 2), "global_blocks": (7, 10, 13)},
    "base_plus": {
        "embed_dim": 112,
        "num_heads": 2,
        "stages": (2, 3, 16, 3),
        "global_blocks": (12, 16, 20),
        "background_size": (14, 14),
    },
    "large": {
        "embed_dim": 144,
        "num_heads": 2,
        "stages": (2, 6, 36, 4),
        "global_blocks": (23, 33, 43),
        "window_spec": (8, 4, 16, 8),
    },
}
_MICRO = {
    "image_size": 256,
    "embed_dim": 32,
    "num_heads": 1,
    "stages": (1, 2, 4, 1),
    "global_blocks": (4, 6, 7),
    "window_spec": (8, 4, 8, 8),
    "d_model": 128,
    "mem_dim": 32,
    "memory_layers": 2,
    "memory_ffn": 256,
    "memory_dropout": 0.0,
    "fuser_layer_scale": 0.1,
    "decoder_heads": 4,
    "decoder_mlp": 256,
    "iou_head_hidden": 128,
    "multimask_output": False,
    "dynamic_multimask": False,
}


@dataclass(frozen=True)
class SAM2Config:
    """Everything that shapes a :class:`~medvl_sam2.model.sam2.SAM2`; defaults are SAM 2.1 tiny at 1024 pixels.

    Names in brackets are those of the official configuration files (facebookresearch/sam2).

    Attributes:
        image_size: Side of the square input in pixels; a multiple of 32. Weights of one size load into any other.
        version: "2.1" or "2.0"; 2.0 has no temporal encoding on object pointers and no spatial no-object embedding.
        embed_dim, num_heads, stages, global_blocks, window_spec, background_size: Hiera's width, heads and blocks per
            stage, blocks with global attention, window side per stage, and the grid of the learned background position
            embedding [window_pos_embed_bkg_spatial_size].
        d_model: Width of FPN, prompts, mask decoder and memory attention.
        mem_dim: Width of a memory token; divides ``d_model``, an object pointer becomes d_model / mem_dim tokens.
        memory_layers, memory_ffn, memory_dropout: Size of the memory attention.
        fuser_layers, fuser_layer_scale: ConvNeXt blocks of the memory encoder and their initial layer scale.
        decoder_depth, decoder_heads, decoder_mlp, iou_head_hidden, mask_in_channels: Size of mask decoder and prompt
            encoder.
        num_memories: Slices whose memories are read, the conditioning one included [num_maskmem].
        memory_stride: Every how many slices a memory is read in inference [memory_temporal_stride_for_eval].
        max_conditioning_slices: Nearest conditioning slices to read, -1 for all [max_cond_frames_in_attn].
        max_object_pointers: Object pointers to read [max_obj_ptrs_in_encoder].
        multimask_output: Predict three masks and keep the one of highest predicted IoU when a slice has
            ``multimask_points[0]..[1]`` points (a box counts as two), in tracking too [multimask_output_in_sam].
        dynamic_multimask: In inference fall back to the best of the three when the single mask is not stable
            [dynamic_multimask_via_stability, stability_delta and stability_threshold likewise].
        binarize_prompted: In inference remember the mask of a slice with user input as 0/1, not as probabilities
            [binarize_mask_from_pts_for_mem_enc]. On, as in the package's video predictor.
        memory_sigmoid_scale, memory_sigmoid_bias: Map from mask probability to the memory encoder's input.
    """

    image_size: int = 1024
    version: Literal["2.0", "2.1"] = "2.1"
    embed_dim: int = 96
    num_heads: int = 1
    stages: tuple[int, ...] = (1, 2, 7, 2)
    global_blocks: tuple[int, ...] = (5, 7, 9)
    window_spec: tuple[int, ...] = (8, 4, 14, 7)
    background_size: tuple[int, int] = (7, 7)
    d_model: int = 256
    mem_dim: int = 64
    memory_layers: int = 4
    memory_ffn: int = 2048
    memory_dropout: float = 0.1
    fuser_layers: int = 2
    fuser_layer_scale: float = 1e-6
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    iou_head_hidden: int = 256
    mask_in_channels: int = 16
    num_memories: int = 7
    memory_stride: int = 1
    max_conditioning_slices: int = -1
    max_object_pointers: int = 16
    multimask_output: bool = True
    multimask_points: tuple[int, int] = (0, 1)
    dynamic_multimask: bool = True
    stability_delta: float = 0.05
    stability_threshold: float = 0.98
    binarize_prompted: bool = True
    memory_sigmoid_scale: float = 20.0
    memory_sigmoid_bias: float = -10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        grid = PATCH_STRIDE * self.window_spec[0]
        if self.image_size % 32 or self.image_size % grid:
            raise ValueError(
                f"image_size: expected a multiple of 32 and of {grid} (window position embedding), "
                f"got {self.image_size}; take for instance {max(grid, 32) * max(1, self.image_size // max(grid, 32))}"
            )
        if self.version not in ("2.0", "2.1"):
            raise ValueError(f"version: expected '2.0' or '2.1', got {self.version!r}; 2.1 is the newer set of weights")
        if len(self.stages) != 4 or len(self.window_spec) != 4:
            raise ValueError(f"stages, window_spec: expected 4 values each, got {self.stages}, {self.window_spec}")
        if self.d_model % 8 or self.d_model % self.mem_dim or (self.d_model // 2) % self.decoder_heads:
            raise ValueError(
                f"d_model: expected a multiple of 8, of mem_dim={self.mem_dim} and of 2*decoder_heads="
                f"{2 * self.decoder_heads}, got {self.d_model}"
            )
        if self.max_conditioning_slices not in (-1, *range(2, 10_000)):
            raise ValueError(
                f"max_conditioning_slices: expected -1 or at least 2, got {self.max_conditioning_slices}; "
                "the nearest slice on either side must fit"
            )

    @property
    def feature_size(self) -> int:
        """Side of the feature grid, ``image_size / 16``."""
        return self.image_size // FEATURE_STRIDE

    @property
    def mask_size(self) -> int:
        """Side of the predicted low-resolution masks, ``image_size / 4``."""
        return self.image_size // PATCH_STRIDE

    @property
    def is_v21(self) -> bool:
        """Whether the parameters that came with 2.1 exist."""
        return self.version == "2.1"

    @classmethod
    def preset(cls, name: str, version: str = "2.1", **overrides: Any) -> "SAM2Config":
        """Return a named configuration.

        Args:
            name: "tiny", "small", "base_plus", "large" (the official variants) or "micro" (ours, 256 pixels).
            version: "2.1" or "2.0".
            **overrides: Fields to set differently, for instance ``image_size=512``.
        """
        presets = {**_HIERA, "micro": _MICRO}
        if name not in presets:
            raise ValueError(f"SAM2 preset: expected one of {sorted(presets)}, got {name!r}")
        return cls(**{**presets[name], "version": version, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SAM2Config":
        """Build a configuration from :meth:`to_dict`'s values; an unknown name is an error."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"SAM2Config: unknown fields {unknown}; known are {sorted(f.name for f in fields(cls))}")
        return cls(**values)
