"""SAM2's mask decoder: a two-way transformer between prompt tokens and image features."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from medvl_sam2.kernels.layer_norm import LayerNorm
from medvl_sam2.model.sam2.config import SAM2Config
from medvl_sam2.model.sam2.layers import MLP, Attention, LayerNorm2d

NUM_MULTIMASK = 3


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, to the image, pass an MLP; then the image attends to the tokens."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, first: bool) -> None:
        super().__init__()
        self.self_attn = Attention(dim, num_heads)
        self.norm1 = LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, num_heads, downsample=2)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, mlp_dim, dim, num_layers=2)
        self.norm3 = LayerNorm(dim)
        self.norm4 = LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, num_heads, downsample=2)
        self.first = first

    def forward(self, tokens: Tensor, image: Tensor, token_pos: Tensor, image_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Update tokens (B, T, d) and image (B, h*w, d)."""
        if self.first:
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens))
        else:
            q = tokens + token_pos
            tokens, _ = self.norm1.add(tokens, self.self_attn(q, q, tokens))
        image_key = image + image_pos
        tokens, _ = self.norm2.add(tokens, self.cross_attn_token_to_image(tokens + token_pos, image_key, image))
        tokens, _ = self.norm3.add(tokens, self.mlp(tokens))
        image, _ = self.norm4.add(image, self.cross_attn_image_to_token(image_key, tokens + token_pos, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """A stack of :class:`TwoWayBlock` and a last look of the tokens at the image."""

    def __init__(self, config: SAM2Config) -> None:
        super().__init__()
        dim, heads = config.d_model, config.decoder_heads
        self.layers = nn.ModuleList(
            TwoWayBlock(dim, heads, config.decoder_mlp, first=i == 0) for i in range(config.decoder_depth)
        )
        self.final_attn_token_to_image = Attention(dim, heads, downsample=2)
        self.norm_final_attn = LayerNorm(dim)

    def forward(self, image: Tensor, image_pos: Tensor, token_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Run on image (B, h*w, d) with positions (1, h*w, d) and tokens (B, T, d), which are their own positions."""
        tokens = token_pos
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pos, image_pos)
        attended = self.final_attn_token_to_image(tokens + token_pos, image + image_pos, image)
        return self.norm_final_attn.add(tokens, attended)[0], image


class DecoderOutput(NamedTuple):
    """All four masks (B, 4, m, m), their IoUs (B, 4), their tokens (B, 4, d), and the object score logit (B, 1)."""

    logits: Tensor
    ious: Tensor
    tokens: Tensor
    object_score: Tensor


class MaskDecoder(nn.Module):
    """Predicts four masks per object; index 0 is the single mask, 1 to 3 are the multimask output."""

    def __init__(self, config: SAM2Config) -> None:
        super().__init__()
        dim, masks = config.d_model, NUM_MULTIMASK + 1
        self.stability = (config.stability_delta, config.stability_threshold)
        self.transformer = TwoWayTransformer(config)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(masks, dim)
        self.obj_score_token = nn.Embedding(1, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.conv_s0 = nn.Conv2d(dim, dim // 8, kernel_size=1)
        self.conv_s1 = nn.Conv2d(dim, dim // 4, kernel_size=1)
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(dim, dim, dim // 8, 3) for _ in range(masks))
        self.iou_prediction_head = MLP(dim, config.iou_head_hidden, masks, 3)
        self.pred_obj_score_head = MLP(dim, dim, 1, 3)

    def forward(
        self,
        image: Tensor,
        image_pos: Tensor,
        sparse: Tensor,
        high_res: tuple[Tensor, Tensor],
    ) -> DecoderOutput:
        """Decode masks.

        Args:
            image: Features with memory and dense prompt (B, d, h, w).
            image_pos: Their positions (1, h*w, d).
            sparse: Prompt tokens (B, T, d).
            high_res: Stride-4 and stride-8 features, (B or 1, d/8, 4h, 4w) and (B or 1, d/4, 2h, 2w).
        """
        batch, dim, height, width = image.shape
        own = torch.cat((self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight))
        tokens = torch.cat((own.expand(batch, -1, -1), sparse), dim=1)
        tokens, image = self.transformer(image.flatten(2).transpose(1, 2), image_pos, tokens)
        mask_tokens = tokens[:, 2 : 3 + NUM_MULTIMASK]

        up1, norm, act1, up2, act2 = self.output_upscaling
        x = image.transpose(1, 2).view(batch, dim, height, width)
        x = act1(norm(up1(x) + high_res[1]))
        x = act2(up2(x) + high_res[0])
        hyper = torch.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        logits = (hyper @ x.flatten(2)).unflatten(-1, x.shape[2:])
        ious = self.iou_prediction_head(tokens[:, 1]).sigmoid()
        return DecoderOutput(logits, ious, mask_tokens, self.pred_obj_score_head(tokens[:, 0]))

    def choose(self, out: DecoderOutput, multimask: bool, fall_back: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Pick one mask per object, without a look at the values on the host.

        Args:
            out: The decoder's output.
            multimask: Take the one of the three with the highest predicted IoU, else the single mask.
            fall_back: Take that one also where the single mask's area changes by more than the stability threshold
                when the logits move by the stability delta.

        Returns:
            Mask logits (B, 1, m, m), predicted IoU (B,), mask token (B, d). The token of a fall-back stays that of the
            single mask, as in facebookresearch/sam2.
        """
        single = torch.zeros_like(out.ious[:, 0], dtype=torch.long)
        best = 1 + out.ious[:, 1:].argmax(dim=-1)
        index = best if multimask else single
        token_index = index
        if fall_back and not multimask:
            delta, threshold = self.stability
            flat = out.logits[:, 0].flatten(1)
            inner, outer = (flat > delta).sum(-1).float(), (flat > -delta).sum(-1).float()
            stable = torch.where(outer > 0, inner / outer, 1.0) >= threshold
            index = torch.where(stable, single, best)
        rows = torch.arange(len(index), device=index.device)
        return out.logits[rows, index].unsqueeze(1), out.ious[rows, index], out.tokens[rows, token_index]
