"""Small parts shared by SAM2's modules: MLP, channel norm, attention, sine and rotary positions."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from medvl_sam2.kernels.attention import attention
from medvl_sam2.kernels.axial_rope import axial_rope_tables
from medvl_sam2.kernels.layer_norm import layer_norm_2d
from medvl_sam2.kernels.linear import Linear


class MLP(nn.Module):
    """Linear layers with an activation between them; the keys are ``layers.N``.

    Args:
        dim_in, dim_hidden, dim_out: Widths.
        num_layers: Linear layers, at least 1.
        gelu: GELU rather than ReLU between the layers.
    """

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, num_layers: int, gelu: bool = False) -> None:
        super().__init__()
        widths = [dim_in, *[dim_hidden] * (num_layers - 1), dim_out]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in zip(widths[:-1], widths[1:]))
        self.activation = "gelu" if gelu else "relu"

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim_in) to (..., dim_out)."""
        for layer in self.layers[:-1]:
            x = layer(x, self.activation)
        return self.layers[-1](x)


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), one fused pass; the result is channels-last in memory."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each pixel's channels."""
        return layer_norm_2d(x, self.weight, self.bias, self.eps, channels_last=True)


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, dropout: float = 0.0) -> Tensor:
    """Softmax attention over (B, N, C) tensors whose channels are ``num_heads`` heads side by side."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = attention(q, k, v, dropout=dropout)
    return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention with separate q, k, v inputs and an inner width that may be smaller, as in SAM's decoder.

    Args:
        dim: Width of queries and output.
        num_heads: Heads; divides ``dim // downsample``.
        downsample: Factor by which the inner width is reduced.
        kv_dim: Width of keys and values, ``dim`` if left out.
    """

    def __init__(self, dim: int, num_heads: int, downsample: int = 1, kv_dim: int | None = None) -> None:
        super().__init__()
        inner, kv_dim = dim // downsample, kv_dim or dim
        self.num_heads = num_heads
        self.q_proj = Linear(dim, inner)
        self.k_proj = Linear(kv_dim, inner)
        self.v_proj = Linear(kv_dim, inner)
        self.out_proj = Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from q (B, N, dim) to k, v (B, M, kv_dim)."""
        out = multi_head_attention(self.q_proj(q), self.k_proj(k), self.v_proj(v), self.num_heads)
        return self.out_proj(out)


# The tables below are plain tensors, not buffers: a model cast to bfloat16 must keep them in float32. They are made
# outside inference mode so that a table first used in inference still serves training.


@lru_cache(maxsize=64)
def sine_position(size: int, dim: int, device: torch.device) -> Tensor:
    """Normalised 2D sine positions of a square grid, (size*size, dim): y in the first half of the channels, x after.

    As ``PositionEmbeddingSine`` of facebookresearch/sam2 with normalize=True and temperature 10000.
    """
    with torch.inference_mode(False), torch.no_grad():
        quarter = dim // 2
        steps = torch.arange(1, size + 1, dtype=torch.float32, device=device) / (size + 1e-6) * (2 * torch.pi)
        period = 10000.0 ** (2 * (torch.arange(quarter, dtype=torch.float32, device=device) // 2) / quarter)
        angles = steps[:, None] / period
        axis = torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=2).flatten(1)
        y, x = axis[:, None].expand(size, size, -1), axis[None].expand(size, size, -1)
        return torch.cat((y, x), dim=-1).flatten(0, 1)


@lru_cache(maxsize=64)
def pointer_position(num_slices: int, span: int, dim: int, device: torch.device) -> Tensor:
    """1D sine positions of object pointers, (2*num_slices+1, dim); row ``num_slices + d``: a distance of d slices.

    As ``get_1d_sine_pe`` of facebookresearch/sam2, the distance divided by ``span``.
    """
    with torch.inference_mode(False), torch.no_grad():
        half = dim // 2
        offsets = torch.arange(-num_slices, num_slices + 1, device=device) / span
        period = 10000.0 ** (2 * (torch.arange(half, dtype=torch.float32, device=device) // 2) / half)
        angles = offsets[:, None] / period
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


@lru_cache(maxsize=64)
def rope_tables(size: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of axial rotary positions on a square grid, each (size*size, dim/2) in float32."""
    with torch.inference_mode(False), torch.no_grad():
        return axial_rope_tables(size, size, dim, device)
