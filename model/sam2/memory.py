"""SAM2's memory: the encoder that turns a predicted mask into memory tokens, and the attention that reads them."""

import torch
from torch import Tensor, nn

from medvl_sam2.kernels.axial_rope import rope_linear
from medvl_sam2.kernels.layer_norm import LayerNorm
from medvl_sam2.kernels.linear import Linear
from medvl_sam2.kernels.mask_encoding import mask_encoder_front
from medvl_sam2.kernels.memory_attention import Projections, memory_attention, memory_self_attention
from medvl_sam2.model.sam2.config import SAM2Config
from medvl_sam2.model.sam2.layers import LayerNorm2d, multi_head_attention, rope_tables, sine_position


class MaskDownSampler(nn.Module):
    """Four 3x3 convolutions of stride 2 (1 -> 4 -> 16 -> 64 -> 256 channels) and a 1x1 to ``dim``."""

    def __init__(self, config: SAM2Config) -> None:
        super().__init__()
        self.size = (config.image_size, config.image_size)
        self.scale, self.shift = config.memory_sigmoid_scale, config.memory_sigmoid_bias
        self.encoder = nn.Sequential()
        channels = 1
        for _ in range(4):
            self.encoder.append(nn.Conv2d(channels, 4 * channels, kernel_size=3, stride=2, padding=1))
            self.encoder.append(LayerNorm2d(4 * channels))
            self.encoder.append(nn.GELU())
            channels *= 4
        self.encoder.append(nn.Conv2d(channels, config.d_model, kernel_size=1))

    def forward(self, logits: Tensor, binarize: bool) -> Tensor:
        """Map mask logits (B, 1, m, m) to (B, dim, R/16, R/16).

        The logits are upsampled to the image's R x R pixels, squashed (or cut at 0 with ``binarize``) and scaled before
        the first convolution.
        """
        conv1, norm1, _, conv2, norm2, _, *rest = self.encoder
        weights = [tensor for part in (conv1, norm1, conv2, norm2) for tensor in (part.weight, part.bias)]
        options = {"scale": self.scale, "shift": self.shift, "binarize": binarize, "eps": norm1.eps}
        x = mask_encoder_front(logits, self.size, *weights, **options)
        for layer in rest:
            x = layer(x)
        return x


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, norm, and an MLP over the channels with a learned scale."""

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm2d(dim)
        self.pwconv1 = Linear(dim, 4 * dim)
        self.pwconv2 = Linear(4 * dim, dim)
        self.gamma = nn.Parameter(scale * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        y = self.norm(self.dwconv(x)).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(self.pwconv1(y, "gelu"))
        return x + y.permute(0, 3, 1, 2)


class Fuser(nn.Module):
    """ConvNeXt blocks in a row."""

    def __init__(self, dim: int, num_layers: int, scale: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConvNeXtBlock(dim, scale) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        for layer in self.layers:
            x = layer(x)
        return x


class MemoryEncoder(nn.Module):
    """Fuses a mask with the image features of its slice into memory tokens."""

    def __init__(self, config: SAM2Config) -> None:
        super().__init__()
        self.mask_downsampler = MaskDownSampler(config)
        self.pix_feat_proj = nn.Conv2d(config.d_model, config.d_model, kernel_size=1)
        self.fuser = Fuser(config.d_model, config.fuser_layers, config.fuser_layer_scale)
        self.out_proj = nn.Conv2d(config.d_model, config.mem_dim, kernel_size=1)

    def forward(self, vision: Tensor, logits: Tensor, binarize: bool = False) -> Tensor:
        """Encode a memory.

        Args:
            vision: Image features (B or 1, d, h, w); one slice serves all objects.
            logits: Masks (B, 1, m, m).
            binarize: Take the masks cut at 0 rather than their probabilities.

        Returns:
            Tokens (B, h*w, mem_dim), row by row.
        """
        return self.fuse(self.pix_feat_proj(vision), logits, binarize)

    def fuse(self, projected: Tensor, logits: Tensor, binarize: bool = False) -> Tensor:
        """The part that depends on the masks: as :meth:`forward` on features that went through ``pix_feat_proj``."""
        x = self.fuser(projected + self.mask_downsampler(logits, binarize))
        return self.out_proj(x).flatten(2).transpose(1, 2)


class RoPEAttention(nn.Module):
    """Attention with rotary positions on queries and keys; keys may be several grids in a row, and unplaced tokens."""

    def __init__(self, dim: int, kv_dim: int, dropout: float) -> None:
        super().__init__()
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(kv_dim, dim)
        self.v_proj = Linear(kv_dim, dim)
        self.out_proj = Linear(dim, dim)
        self.dropout = dropout

    def projections(self) -> Projections:
        """The weights in the kernels' form."""
        parts = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        return Projections(*(tensor for part in parts for tensor in (part.weight, part.bias)))

    def forward(
        self, x: Tensor, memory: Tensor | None = None, position: Tensor | None = None, num_unplaced: int = 0
    ) -> Tensor:
        """Attend from x (B, N, dim), N a square grid, to itself or to ``memory`` (B, M, kv_dim).

        Keys of a memory are that of memory + ``position``; its last ``num_unplaced`` tokens have no place in the grid
        (object pointers) and are not turned.
        """
        weights = self.projections()
        rope = rope_tables(round(x.shape[1] ** 0.5), weights.q_weight.shape[0], x.device)
        if self.training and self.dropout:
            source, values = (x, x) if memory is None else (memory + position, memory)
            q = rope_linear(x, weights.q_weight, weights.q_bias, rope)
            k = rope_linear(source, weights.k_weight, weights.k_bias, rope, num_plain_tokens=num_unplaced)
            return self.out_proj(multi_head_attention(q, k, self.v_proj(values), num_heads=1, dropout=self.dropout))
        if memory is None:
            return memory_self_attention(x, weights, rope)
        return memory_attention(x, memory, position, weights, rope, num_pointer_tokens=num_unplaced)


class MemoryAttentionLayer(nn.Module):
    """Pre-norm layer: self-attention over the slice, cross-attention to the memories, MLP.

    Both attentions leave their branch apart from the tokens: the part that follows adds it together with its norm.
    """

    def __init__(self, config: SAM2Config) -> None:
        super().__init__()
        dim, dropout = config.d_model, config.memory_dropout
        self.self_attn = RoPEAttention(dim, dim, dropout)
        self.cross_attn_image = RoPEAttention(dim, config.mem_dim, dropout)
        self.linear1 = Linear(dim, config.memory_ffn)
        self.linear2 = Linear(config.memory_ffn, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.norm3 = LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def self_attention(self, x: Tensor) -> Tensor:
        """Branch of the self-attention on (B, h*w, d); it reads no memory, so it can be shared between objects."""
        return self.dropout(self.self_attn(self.norm1(x)))

    def cross_attention(
        self, x: Tensor, branch: Tensor | None, memory: Tensor, position: Tensor, num_pointer_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Cross-attention from ``x + branch`` to ``memory`` (B, M, mem_dim): that sum, and the new branch.

        Positions are added to the keys alone.
        """
        y, x = self.norm2.add(x, branch)
        return x, self.dropout(self.cross_attn_image(y, memory, position, num_pointer_tokens))

    def feed_forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor:
        """Residual MLP on ``x + branch``."""
        y, x = self.norm3.add(x, branch)
        return x + self.dropout(self.linear2(self.dropout(self.linear1(y, "relu"))))


class MemoryAttention(nn.Module):
    """Conditions the image features of a slice on memory tokens and object pointers."""

    def __init__(self, config: SAM2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MemoryAttentionLayer(config) for _ in range(config.memory_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def prepare(self, vision: Tensor) -> Tensor:
        """The part that reads no memory: (S, d, h, w) to tokens (S, h*w, d) after the first self-attention.

        Exact to compute once per slice for all objects, and for many slices at a time.
        """
        position = sine_position(vision.shape[-1], vision.shape[1], vision.device)
        x = vision.flatten(2).transpose(1, 2) + (0.1 * position).to(self.norm.weight.dtype)
        return x + self.layers[0].self_attention(x)

    def attend(self, prepared: Tensor, memory: Tensor, position: Tensor, num_pointer_tokens: int) -> Tensor:
        """The rest: tokens (B or 1, h*w, d) from :meth:`prepare` and memories (B, M, mem_dim) to (B, h*w, d)."""
        x = prepared.expand(memory.shape[0], -1, -1)
        for index, layer in enumerate(self.layers):
            branch = layer.self_attention(x) if index else None
            x, branch = layer.cross_attention(x, branch, memory, position, num_pointer_tokens)
            x = layer.feed_forward(x, branch)
        return self.norm(x)
