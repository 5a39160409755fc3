"""Configuration of every part of the model, and the presets.

What the paper (arXiv 2601.09879) does not disclose is a named value here, with the public source of its default.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from medvl_sam2.model.sam2.config import SAM2Config

Window = tuple[float, float]


@dataclass(frozen=True)
class VolumeConfig:
    """How a CT volume becomes the encoder grid and the stack of SAM2 slices.

    Attributes:
        size: Encoder grid (D, H, W). M3D-CLIP takes 32 x 256 x 256.
        patch: Patch of the 3D ViT (d, h, w), 4 x 16 x 16 in M3D-CLIP: 2,048 tokens.
        normalisation: "window" (HU window), "minmax" (M3D-Cap) or "percentile" (M3D-Seg's foreground percentiles).
        window: HU mapped to 0 and 1 for the encoder; [-1000, 1000] as in the public CT-RATE pipelines.
        slices: Most axial slices handed to SAM2; a shorter scan keeps its own slices.
        slice_windows: HU windows of SAM2's three channels.
        slice_mean: Subtracted from the 0-1 channels (ImageNet, as SAM2 was trained).
        slice_std: Divides the channels.
        foreground_hu: Voxels above this belong to the patient when the scan is cropped to its foreground.
    """

    size: tuple[int, int, int] = (32, 256, 256)
    patch: tuple[int, int, int] = (4, 16, 16)
    normalisation: str = "window"
    window: Window = (-1000.0, 1000.0)
    slices: int = 32
    slice_windows: tuple[Window, Window, Window] = ((-1000.0, 1000.0),) * 3
    slice_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    slice_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    foreground_hu: float = -400.0

    def __post_init__(self) -> None:
        if any(s % p for s, p in zip(self.size, self.patch)):
            raise ValueError(f"volume.patch: expected divisors of size {self.size}, got {self.patch}")
        if self.normalisation not in ("window", "minmax", "percentile"):
            raise ValueError(f"volume.normalisation: expected window, minmax or percentile, got {self.normalisation!r}")

    @property
    def tokens(self) -> int:
        """Patch tokens of one volume (2,048 for M3D-CLIP)."""
        d, h, w = (s // p for s, p in zip(self.size, self.patch))
        return d * h * w


@dataclass(frozen=True)
class VisionConfig:
    """3D ViT; the defaults are M3D-CLIP's ViT-B (BAAI-DCAI/M3D)."""

    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    mlp_size: int = 3072


@dataclass(frozen=True)
class ProjectorConfig:
    """Projector from ViT tokens to LLM tokens.

    Attributes:
        kind: "mixer" (the paper's; single-stream form of Med3DVLM's MixerLayer), "grouped_linear" (4 neighbours
            joined, then one linear layer: the rival at the same number of tokens) or "pooled" (average, then linear).
        tokens: Visual tokens that the LLM sees; the paper compresses 2,048 to 512.
        depth: Mixer layers; not disclosed, Med3DVLM uses 2.
    """

    kind: str = "mixer"
    tokens: int = 512
    depth: int = 2


@dataclass(frozen=True)
class LanguageConfig:
    """The LLM, as keyword arguments of its transformers config.

    Attributes:
        model_type: "qwen2" (InternVL2.5-1B, 4B) or "llama" (InternLM2 re-laid, 2B and 8B).
        config: Arguments of Qwen2Config / LlamaConfig.
        seg_token_id: Id of [SEG], the token whose hidden state prompts SAM2; appended as the last row by `convert`.
        system: System message of every conversation.
    """

    model_type: str = "qwen2"
    config: dict[str, Any] = field(default_factory=dict)
    seg_token_id: int = 0
    system: str = "You read CT scans."

    @property
    def hidden_size(self) -> int:
        """Width of the LLM."""
        return int(self.config["hidden_size"])


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA on every linear layer of the LLM; not disclosed in the paper, defaults of Sa2VA and UniBiomed."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class SegConfig:
    """How the [SEG] hidden state reaches SAM2.

    Attributes:
        convention: "input": the hidden state where [SEG] is the input (Sa2VA); "predicting": the one that predicts
            it (LISA, M3D-LaMed). Saved with the weights, since a mismatch would be silent.
        every_slice: Give the [SEG] prompt on every slice, not on the conditioning slice alone.
        use_memory: Carry SAM2's memory from slice to slice; False runs every slice on its own.
        object_gate: Object-score logit under which a slice of a text-prompted object stays empty.
        mask_threshold: Mask logit above which a pixel belongs to the object; SAM2's is 0.
    """

    convention: str = "input"
    every_slice: bool = True
    use_memory: bool = True
    object_gate: float = 0.0
    mask_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.convention not in ("input", "predicting"):
            raise ValueError(f"seg.convention: expected 'input' or 'predicting', got {self.convention!r}")


@dataclass(frozen=True)
class MedVLConfig:
    """Everything needed to build the model."""

    name: str
    volume: VolumeConfig
    vision: VisionConfig
    projector: ProjectorConfig
    language: LanguageConfig
    lora: LoRAConfig
    seg: SegConfig
    sam2: SAM2Config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form."""
        return {**asdict(replace(self, sam2=None)), "sam2": self.sam2.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "MedVLConfig":
        """Inverse of `to_dict`.

        Raises:
            ValueError: A section is missing or has an unknown key.
        """
        sections = {
            "volume": VolumeConfig,
            "vision": VisionConfig,
            "projector": ProjectorConfig,
            "language": LanguageConfig,
            "lora": LoRAConfig,
            "seg": SegConfig,
        }
        try:
            built = {key: section(**_tuples(data[key])) for key, section in sections.items()}
            return cls(name=data["name"], sam2=SAM2Config.from_dict(data["sam2"]), **built)
        except (KeyError, TypeError) as error:
            raise ValueError(f"config: expected the sections that save_pretrained writes, got {error}") from error

    def save(self, directory: str | Path) -> None:
        """Write `config.json`."""
        Path(directory, "config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> "MedVLConfig":
        """Read `config.json` of a model directory."""
        return cls.from_dict(json.loads(Path(directory, "config.json").read_text()))


def _tuples(section: dict[str, Any]) -> dict[str, Any]:
    def freeze(value: Any) -> Any:
        return tuple(freeze(item) for item in value) if isinstance(value, list) else value

    return {key: value if isinstance(value, dict) else freeze(value) for key, value in section.items()}
