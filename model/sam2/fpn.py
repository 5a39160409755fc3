"""SAM2's feature pyramid: four 1x1 convolutions and one top-down step."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from medvl_sam2.model.sam2.config import SAM2Config
from medvl_sam2.model.sam2.hiera import Hiera


class FpnNeck(nn.Module):
    """Brings the trunk's maps to ``d_model`` channels; the stride-32 map flows into the stride-16 one and ends there.

    ``convs.0`` belongs to the coarsest map, as in the official checkpoints.
    """

    def __init__(self, channels: tuple[int, ...], d_model: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(c, d_model, kernel_size=1))) for c in reversed(channels)
        )

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the maps at strides 4, 8 and 16, each (B, d_model, ...)."""
        coarse, c16, c8, c4 = (conv(x) for conv, x in zip(self.convs, reversed(maps)))
        return c4, c8, c16 + F.interpolate(coarse, scale_factor=2, mode="nearest")


class ImageEncoder(nn.Module):
    """Hiera trunk and FPN neck."""

    def __init__(self, config: SAM2Config) -> None:
        super().__init__()
        self.trunk = Hiera(config)
        self.neck = FpnNeck(self.trunk.channels, config.d_model)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode (B, 3, R, R) into d_model-channel maps at strides 4, 8 and 16."""
        return self.neck(self.trunk(images))
