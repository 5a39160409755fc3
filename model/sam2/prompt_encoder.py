"""SAM's prompt encoder: points, boxes and mask hints become tokens and a dense map."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvl_sam2.model.sam2.config import SAM2Config
from medvl_sam2.model.sam2.layers import LayerNorm2d
from medvl_sam2.model.sam2.structures import Prompts


class RandomPosition(nn.Module):
    """Sine and cosine of random projections of (x, y); the projection is part of the weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, xy: Tensor) -> Tensor:
        """Encode positions (..., 2) in [0, 1] into (..., dim), in float32.

        Written without a matrix product, which autocast would turn to half precision: the phases span many periods.
        """
        gx, gy = self.positional_encoding_gaussian_matrix.float()
        xy = 2 * xy.float() - 1
        phase = 2 * math.pi * (xy[..., :1] * gx + xy[..., 1:] * gy)
        return torch.cat((phase.sin(), phase.cos()), dim=-1)

    def grid(self, size: int) -> Tensor:
        """Encode the pixel centres of a square grid: (size*size, dim)."""
        device = self.positional_encoding_gaussian_matrix.device
        steps = (torch.arange(size, dtype=torch.float32, device=device) + 0.5) / size
        xy = torch.stack((steps[None].expand(size, size), steps[:, None].expand(size, size)), dim=-1)
        return self(xy.flatten(0, 1))


class PromptEncoder(nn.Module):
    """Encodes :class:`Prompts` for the mask decoder, as in facebookresearch/sam2's video predictor."""

    def __init__(self, config: SAM2Config) -> None:
        super().__init__()
        dim, hidden = config.d_model, config.mask_in_channels
        self.image_size, self.feature_size, self.mask_size = config.image_size, config.feature_size, config.mask_size
        self.pe_layer = RandomPosition(dim)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, hidden // 4, kernel_size=2, stride=2),
            LayerNorm2d(hidden // 4),
            nn.GELU(),
            nn.Conv2d(hidden // 4, hidden, kernel_size=2, stride=2),
            LayerNorm2d(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, dim)

    def grid_position(self) -> Tensor:
        """Position of every feature pixel, (1, h*w, d)."""
        return self.pe_layer.grid(self.feature_size)[None]

    def point_tokens(self, points: Tensor, labels: Tensor) -> Tensor:
        """Tokens (B, P, d) of points in pixels; labels -1 padding, 0 and 1 points, 2 and 3 box corners."""
        table = torch.cat([self.not_a_point_embed.weight, *[e.weight for e in self.point_embeddings]])
        position = self.pe_layer((points.float() + 0.5) / self.image_size)
        return position * (labels != -1).unsqueeze(-1) + F.embedding(labels.long() + 1, table)

    def sparse_tokens(self, prompts: Prompts, batch: int) -> Tensor:
        """Tokens (B, T, d): box corners, points, padding, embeddings; two padding tokens when there is no point."""
        table = self.not_a_point_embed.weight
        points, labels = [], []
        if prompts.boxes is not None:
            points.append(prompts.boxes.unflatten(1, (2, 2)).float())
            labels.append(torch.arange(2, 4, device=table.device).expand(batch, 2))
        if prompts.points is not None:
            points.append(prompts.points.float())
            labels.append(prompts.labels.long())
        padding = table.expand(batch, 1 if points else 2, -1)
        tokens = [self.point_tokens(torch.cat(points, 1), torch.cat(labels, 1))] if points else []
        tokens.append(padding)
        if prompts.embeddings is not None:
            tokens.append(prompts.embeddings)
        return torch.cat(tokens, dim=1)

    def dense_map(self, masks: Tensor | None) -> Tensor:
        """What is added to the image features: (B, d, h, w) from mask logits, or (1, d, 1, 1) when there are none."""
        if masks is None:
            return self.no_mask_embed.weight[:, :, None, None]
        if masks.shape[-2:] != (self.mask_size, self.mask_size):
            size = (self.mask_size, self.mask_size)
            masks = F.interpolate(masks.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
        return self.mask_downscaling(masks.to(self.no_mask_embed.weight.dtype))

    def forward(self, prompts: Prompts, batch: int) -> tuple[Tensor, Tensor]:
        """Return the sparse tokens (B, T, d) and the dense map, see above."""
        return self.sparse_tokens(prompts, batch), self.dense_map(prompts.masks)
