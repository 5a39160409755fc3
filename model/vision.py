"""M3D-CLIP's 3D vision transformer, with the parameter names of the public checkpoint.

A volume (1, 32, 256, 256) becomes 8 x 16 x 16 patch tokens. Maths as MONAI's ViT (`proj_type="perceptron"`,
`qkv_bias=False`), which M3D used; written here without MONAI because its key names moved between releases.
"""

import torch
from torch import Tensor, nn

from medvl_sam2.kernels.attention import attention
from medvl_sam2.kernels.layer_norm import LayerNorm
from medvl_sam2.kernels.patch_embed3d import patch_embed3d
from medvl_sam2.model.config import VisionConfig, VolumeConfig


class PatchEmbedding(nn.Module):
    """Cuts a volume into patches, projects them and adds the position."""

    def __init__(self, volume: VolumeConfig, hidden_size: int):
        super().__init__()
        self.patch = volume.patch
        patch_size = volume.patch[0] * volume.patch[1] * volume.patch[2]
        self.position_embeddings = nn.Parameter(torch.zeros(1, volume.tokens, hidden_size))
        # The checkpoint counts the rearrangement as layer 0 of a Sequential.
        self.patch_embeddings = nn.Sequential(nn.Identity(), nn.Linear(patch_size, hidden_size))
        nn.init.trunc_normal_(self.position_embeddings, std=0.02)

    def forward(self, volume: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(B, 1, D, H, W) in 0-1 -> (B, T, hidden); see `VisionEncoder.forward`."""
        linear, positions = self.patch_embeddings[1], self.position_embeddings[0]
        if tokens is None:
            return patch_embed3d(volume[:, 0], linear.weight, linear.bias, positions, patch=self.patch)
        return patch_embed3d(volume[:, 0], linear.weight, linear.bias, None, patch=self.patch) + positions[tokens]


class SelfAttention(nn.Module):
    """Multi-head self-attention; queries, keys and values without bias."""

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.out_proj(attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.linear1 = nn.Linear(hidden_size, mlp_size)
        self.linear2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.linear2(nn.functional.gelu(self.linear1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size)
        self.attn = SelfAttention(config.hidden_size, config.heads)
        self.norm2 = LayerNorm(config.hidden_size)
        self.mlp = MLP(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Two (B, N, C), whose sum flows on; None adds nothing. The next block forms the sum with its norm."""
        y, x = self.norm1.add(x, branch)
        y, x = self.norm2.add(x, self.attn(y))
        return x, self.mlp(y)


class VisionEncoder(nn.Module):
    """3D ViT.

    Args:
        volume: Grid and patch; fixes the number of tokens.
        config: Width and depth.
    """

    def __init__(self, volume: VolumeConfig, config: VisionConfig):
        super().__init__()
        self.size = volume.size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embedding = PatchEmbedding(volume, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.hidden_size)

    def forward(self, volume: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Encode volumes.

        Args:
            volume: (B, 1, D, H, W), values 0-1.
            tokens: (B, T) which token of the whole grid each patch is, for volumes that are parts of the grid, as in
                pre-training on crops; None for whole grids.

        Returns:
            (B, T, hidden): the patch tokens of the last layer after the final norm, without the class token, in
            order of depth, height, width (M3D-LaMed's `select_feature="patch"`).

        Raises:
            ValueError: The grid is not the one that the model was built for.
        """
        if tokens is None and (volume.ndim != 5 or tuple(volume.shape[1:]) != (1, *self.size)):
            raise ValueError(
                f"volume: expected shape (B, 1, {', '.join(map(str, self.size))}), got {tuple(volume.shape)}; "
                "resample with VolumeProcessor"
            )
        x = self.patch_embedding(volume, tokens)
        # The class token has no position, as in MONAI.
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        branch = None
        for block in self.blocks:
            x, branch = block(x, branch)
        return self.norm.add(x, branch)[0][:, 1:]
