"""Hiera image trunk (arXiv 2306.00989) as SAM2 uses it, with the official parameter names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvl_sam2.kernels.layer_norm import LayerNorm
from medvl_sam2.kernels.linear import Linear
from medvl_sam2.kernels.window_attention import projected_window_attention
from medvl_sam2.model.sam2.config import SAM2Config
from medvl_sam2.model.sam2.layers import MLP


def pool2x2(x: Tensor) -> Tensor:
    """Max-pool (B, H, W, C) by 2 in height and width."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


class MultiScaleAttention(nn.Module):
    """Attention inside each window (side 0: over the whole map).

    ``pool`` takes the maximum of the queries over 2x2 and so halves the map.
    """

    def __init__(self, dim: int, dim_out: int, num_heads: int, window: int, pool: bool) -> None:
        super().__init__()
        self.num_heads, self.window, self.pool = num_heads, window, pool
        self.qkv = Linear(dim, dim_out * 3)
        self.proj = Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, dim) to (B, H', W', dim_out)."""
        qkv = self.qkv
        x = projected_window_attention(x, qkv.weight, qkv.bias, self.num_heads, self.window, pool=self.pool)
        return self.proj(x)


class MultiScaleBlock(nn.Module):
    """Pre-norm block: attention in windows (``window`` 0: over the whole grid), then an MLP of four times the width."""

    def __init__(self, dim: int, dim_out: int, num_heads: int, window: int, pool: bool) -> None:
        super().__init__()
        self.pool = pool
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = MultiScaleAttention(dim, dim_out, num_heads, window, pool)
        self.norm2 = LayerNorm(dim_out, eps=1e-6)
        self.mlp = MLP(dim_out, 4 * dim_out, dim_out, num_layers=2, gelu=True)
        if dim != dim_out:
            self.proj = Linear(dim, dim_out)

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map (B, H, W, dim) to (B, H', W', dim_out).

        The result is the sum of two maps, which the next block forms with its norm; ``branch`` is what it adds to x.
        """
        y, x = self.norm1.add(x, branch)
        if hasattr(self, "proj"):
            x = self.proj(y)
            x = pool2x2(x) if self.pool else x
        y, x = self.norm2.add(x, self.attn(y))
        return x, self.mlp(y)


class PatchEmbed(nn.Module):
    """7x7 convolution of stride 4 from RGB; the result is (B, H/4, W/4, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=7, stride=4, padding=3)

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, H, W)."""
        return self.proj(images).permute(0, 2, 3, 1)


class Hiera(nn.Module):
    """Four stages at strides 4, 8, 16, 32; each doubles the width and the heads of the one before."""

    def __init__(self, config: SAM2Config) -> None:
        super().__init__()
        dim, heads = config.embed_dim, config.num_heads
        self.patch_embed = PatchEmbed(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, *config.background_size))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, dim, config.window_spec[0], config.window_spec[0]))
        ends = [sum(config.stages[: i + 1]) - 1 for i in range(4)]
        self.stage_ends = tuple(ends)
        self.blocks = nn.ModuleList()
        stage = 0
        for index in range(ends[-1] + 1):
            # The first block of a stage still works on the windows of the stage before, and pools.
            window = 0 if index in config.global_blocks else config.window_spec[stage]
            pool = index - 1 in ends
            dim_out = 2 * dim if pool else dim
            if pool:
                heads, stage = 2 * heads, stage + 1
            self.blocks.append(MultiScaleBlock(dim, dim_out, heads, window, pool))
            dim = dim_out
        self.channels = tuple(config.embed_dim * 2**i for i in range(4))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.pos_embed_window, std=0.02)

    def position_embedding(self, height: int, width: int) -> Tensor:
        """Learned positions (1, height, width, C): the background grid interpolated, plus the tiled window."""
        background = F.interpolate(self.pos_embed, size=(height, width), mode="bicubic")
        window = self.pos_embed_window
        window = window.tile(1, 1, height // window.shape[2], width // window.shape[3])
        return (background + window).permute(0, 2, 3, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encode (B, 3, H, W) into four maps (B, C_i, H_i, W_i), finest first, channels-last in memory."""
        x = self.patch_embed(images)
        x = x + self.position_embedding(x.shape[1], x.shape[2])
        outputs, branch = [], None
        for index, block in enumerate(self.blocks):
            x, branch = block(x, branch)
            if index in self.stage_ends:
                x, branch = x + branch, None
                outputs.append(x.permute(0, 3, 1, 2))
        return outputs
