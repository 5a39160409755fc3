"""Projectors from the ViT's tokens to the LLM's: the paper's MLP-Mixer, and its rivals at the same token count."""

import torch
from torch import Tensor, nn

from medvl_sam2.kernels.mixer import mixer_layer
from medvl_sam2.model.config import ProjectorConfig


class _MixerMLP(nn.Module):
    """Linear, GELU, linear, with Med3DVLM's parameter names."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.mm_projector = nn.Sequential(
            nn.Linear(inputs, outputs), nn.Sequential(nn.GELU(), nn.Linear(outputs, outputs))
        )

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(w1, b1, w2, b2)."""
        first, second = self.mm_projector[0], self.mm_projector[1][1]
        return first.weight, first.bias, second.weight, second.bias


class MixerLayer(nn.Module):
    """Token mixing n -> n', then channel mixing d -> d' (mirthAI/Med3DVLM): no residual, no expansion."""

    def __init__(self, tokens: tuple[int, int], channels: tuple[int, int]):
        super().__init__()
        self.ln1 = nn.LayerNorm(channels[0])
        self.mlp1 = _MixerMLP(*tokens)
        self.ln2 = nn.LayerNorm(channels[0])
        self.mlp2 = _MixerMLP(*channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, d) -> (B, n', d')."""
        ln1, ln2 = (self.ln1.weight, self.ln1.bias), (self.ln2.weight, self.ln2.bias)
        return mixer_layer(x, *ln1, *self.mlp1.weights, *ln2, *self.mlp2.weights)


class MixerProjector(nn.Module):
    """Stack of Mixer layers; tokens halve and channels double per layer so that the last gives (tokens, hidden).

    With two layers and M3D-CLIP: (2048, 768) -> (1024, H/2) -> (512, H).
    """

    def __init__(self, tokens_in: int, channels_in: int, config: ProjectorConfig, hidden_size: int):
        super().__init__()
        if hidden_size % 2 ** (config.depth - 1):
            raise ValueError(f"projector.depth: expected 2**(depth-1) to divide {hidden_size}, got {config.depth}")
        tokens = [config.tokens * 2**i for i in reversed(range(config.depth))]
        channels = [hidden_size // 2**i for i in reversed(range(config.depth))]
        self.mixer = nn.ModuleList(
            MixerLayer(t, c) for t, c in zip(zip([tokens_in, *tokens], tokens), zip([channels_in, *channels], channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, tokens, hidden)."""
        for layer in self.mixer:
            x = layer(x)
        return x


class GroupedLinearProjector(nn.Module):
    """Neighbouring tokens joined, then one linear layer: the 'linear projection' at the Mixer's token count."""

    def __init__(self, tokens_in: int, channels_in: int, config: ProjectorConfig, hidden_size: int):
        super().__init__()
        self.group = _group(tokens_in, config.tokens)
        self.linear = nn.Linear(self.group * channels_in, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, tokens, hidden)."""
        return self.linear(x.reshape(len(x), -1, self.group * x.shape[-1]))


class PooledProjector(nn.Module):
    """Neighbouring tokens averaged, then M3D-LaMed's two linear layers."""

    def __init__(self, tokens_in: int, channels_in: int, config: ProjectorConfig, hidden_size: int):
        super().__init__()
        self.group = _group(tokens_in, config.tokens)
        self.mlp = nn.Sequential(nn.Linear(channels_in, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, tokens, hidden)."""
        return self.mlp(torch.unflatten(x, 1, (-1, self.group)).mean(2))


def _group(tokens_in: int, tokens: int) -> int:
    if tokens_in % tokens:
        raise ValueError(f"projector.tokens: expected a divisor of {tokens_in}, got {tokens}")
    return tokens_in // tokens


_KINDS = {"mixer": MixerProjector, "grouped_linear": GroupedLinearProjector, "pooled": PooledProjector}


def build_projector(config: ProjectorConfig, tokens_in: int, channels_in: int, hidden_size: int) -> nn.Module:
    """Projector (B, tokens_in, channels_in) -> (B, config.tokens, hidden_size).

    Raises:
        ValueError: Unknown kind, or sizes that do not divide.
    """
    if config.kind not in _KINDS:
        raise ValueError(f"projector.kind: expected one of {', '.join(_KINDS)}, got {config.kind!r}")
    return _KINDS[config.kind](tokens_in, channels_in, config, hidden_size)
