"""SAM2 as one trainable module over CT slices; a port of facebookresearch/sam2 with its parameter names.

The batch of every step is a batch of objects. They may share one slice, or come from slices of different volumes.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvl_sam2.kernels.linear import Linear
from medvl_sam2.model.sam2.config import SAM2Config
from medvl_sam2.model.sam2.fpn import ImageEncoder
from medvl_sam2.model.sam2.layers import MLP, pointer_position, sine_position
from medvl_sam2.model.sam2.mask_decoder import DecoderOutput, MaskDecoder
from medvl_sam2.model.sam2.memory import MemoryAttention, MemoryEncoder
from medvl_sam2.model.sam2.memory_bank import MemoryBank, MemorySelection
from medvl_sam2.model.sam2.prompt_encoder import PromptEncoder
from medvl_sam2.model.sam2.structures import MemoryEntry, Prompts, SliceFeatures, StepOutput

NO_OBJECT = -1024.0
"""Logit of every pixel of a mask whose object is predicted absent."""

GIVEN_SCALE, GIVEN_BIAS = 20.0, -10.0


class SAM2(nn.Module):
    """Image encoder, prompt encoder, mask decoder and memory of SAM2.

    Args:
        config: Sizes and switches.

    Example:
        >>> features = sam2.encode_images(images)                        # (S, 3, R, R) -> SliceFeatures
        >>> bank = MemoryBank(num_slices=len(features))
        >>> first = sam2.step(features[0], prompts, bank, is_conditioning=True, slice_index=0)
        >>> bank.add(0, first.memory, is_conditioning=True)
        >>> second = sam2.step(features[1], None, bank, is_conditioning=False, slice_index=1)
    """

    def __init__(self, config: SAM2Config) -> None:
        super().__init__()
        self.config = config
        dim, mem = config.d_model, config.mem_dim
        self.image_encoder = ImageEncoder(config)
        self.mask_downsample = nn.Conv2d(1, 1, kernel_size=4, stride=4)
        self.memory_attention = MemoryAttention(config)
        self.memory_encoder = MemoryEncoder(config)
        self.maskmem_tpos_enc = nn.Parameter(torch.zeros(config.num_memories, 1, 1, mem))
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, dim))
        self.no_mem_pos_enc = nn.Parameter(torch.zeros(1, 1, dim))
        self.no_obj_ptr = nn.Parameter(torch.zeros(1, dim))
        self.sam_prompt_encoder = PromptEncoder(config)
        self.sam_mask_decoder = MaskDecoder(config)
        self.obj_ptr_proj = MLP(dim, dim, dim, 3)
        if config.is_v21:
            self.no_obj_embed_spatial = nn.Parameter(torch.zeros(1, mem))
            self.obj_ptr_tpos_proj = Linear(dim, mem)
            nn.init.trunc_normal_(self.no_obj_embed_spatial, std=0.02)
        for parameter in (self.maskmem_tpos_enc, self.no_mem_embed, self.no_mem_pos_enc, self.no_obj_ptr):
            nn.init.trunc_normal_(parameter, std=0.02)

    def load_official_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a checkpoint of facebookresearch/sam2 (or its "model" entry) strictly.

        Raises:
            ValueError: Keys are missing, left over, or of another shape; the message lists them.
        """
        state = state.get("model", state)
        own = self.state_dict()
        missing = sorted(set(own) - set(state))
        extra = sorted(set(state) - set(own))
        shapes = [
            f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
            for k in own
            if k in state and state[k].shape != own[k].shape
        ]
        if missing or extra or shapes:
            raise ValueError(
                f"SAM2 checkpoint: expected the keys of this variant (version {self.config.version}), "
                f"got missing {missing}, left over {extra}, mis-shaped {shapes}; check the variant and the version"
            )
        self.load_state_dict(state)

    def encode_images(self, images: Tensor) -> SliceFeatures:
        """Encode slices.

        Args:
            images: (S, 3, R, R), normalised, R = ``config.image_size``.
        """
        size = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images: expected (S, 3, {size}, {size}), got {tuple(images.shape)}; resize them first")
        c4, c8, c16 = self.image_encoder(images.contiguous(memory_format=torch.channels_last))
        return SliceFeatures(c16, (self.sam_mask_decoder.conv_s0(c4), self.sam_mask_decoder.conv_s1(c8)))

    def step(
        self,
        features: SliceFeatures,
        prompts: Prompts | None,
        memory: MemoryBank | None,
        *,
        is_conditioning: bool,
        slice_index: int = 0,
        reverse: bool = False,
        multimask: bool | None = None,
        encode_memory: bool = True,
        gate_by_object_score: bool | None = None,
    ) -> StepOutput:
        """Segment one slice for B objects; differentiable, and without a host synchronisation.

        Args:
            features: One slice for all objects (batch 1), or one per object (batch B).
            prompts: Prompts of the B objects, or None.
            memory: Memories of other slices. None: every slice stands alone.
            is_conditioning: The slice starts a chain: it reads no memory.
            slice_index: Its place in the volume.
            reverse: Whether the chain runs towards lower slices.
            multimask: Choose among three masks; None decides by the number of points as the configuration says.
            encode_memory: Return the slice's memory entry as well.
            gate_by_object_score: Make absent objects' masks NO_OBJECT; None gates in inference, not in training.
        """
        prompts = prompts or Prompts()
        batch = self._batch_size(features, prompts, memory)
        vision = features.vision
        if prompts.given_masks is not None:
            out = self._given_masks_output(features, prompts.given_masks, batch)
        else:
            if is_conditioning or memory is None:
                vision = vision + self.no_mem_embed[0, :, :, None, None]
            else:
                vision = self._read_memory(vision, memory.select(slice_index, self.config, reverse, self.training))
            multimask = self.wants_multimask(prompts, multimask)
            gate = not self.training if gate_by_object_score is None else gate_by_object_score
            out = self._decode(vision, features.high_res, prompts, batch, multimask, gate)
        if not encode_memory:
            return out
        tokens = self.encode_memory(features.vision, out.low_res_logits, out.object_score, prompts.is_from_user)
        return StepOutput(**{**vars(out), "memory": MemoryEntry(tokens, out.object_pointer)})

    def wants_multimask(self, prompts: Prompts, multimask: bool | None = None) -> bool:
        """Whether to choose among three masks; None decides by the number of points as the configuration says."""
        low, high = self.config.multimask_points
        if multimask is None:
            return self.config.multimask_output and low <= prompts.num_points <= high
        return multimask

    def predict_slices(
        self,
        features: SliceFeatures,
        prompts: Prompts,
        *,
        multimask: bool | None = None,
        gate_by_object_score: bool | None = None,
        max_batch: int = 64,
    ) -> tuple[Tensor, Tensor]:
        """Memory-free mode: the same prompts (such as [SEG] vectors) on every slice, all slices in parallel.

        Args:
            features: S slices.
            prompts: Prompts of the B objects.
            multimask, gate_by_object_score: As in :meth:`step`.
            max_batch: Most slice-object pairs decoded at a time.

        Returns:
            Logits (S, B, m, m) and object scores (S, B).
        """
        batch = prompts.batch_size or 1
        chunk = max(1, max_batch // batch)
        logits, scores = [], []
        for start in range(0, len(features), chunk):
            part = features[start : start + chunk]
            out = self.step(
                part.repeat_interleave(batch),
                prompts.repeat(len(part)),
                None,
                is_conditioning=True,
                multimask=multimask,
                encode_memory=False,
                gate_by_object_score=gate_by_object_score,
            )
            logits.append(out.low_res_logits.view(len(part), batch, *out.low_res_logits.shape[-2:]))
            scores.append(out.object_score.view(len(part), batch))
        return torch.cat(logits), torch.cat(scores)

    def encode_memory(
        self,
        vision: Tensor,
        low_res_logits: Tensor,
        object_score: Tensor,
        is_from_user: bool = False,
        is_projected: bool = False,
    ) -> Tensor:
        """Turn masks into memory tokens.

        Args:
            vision: Raw image features (B or 1, d, h, w).
            low_res_logits: Masks (B, 1, m, m).
            object_score: (B, 1); where it is not positive the no-object embedding is added.
            is_from_user: Whether a user's input made these masks, see ``config.binarize_prompted``.
            is_projected: ``vision`` went through the memory encoder's ``pix_feat_proj`` before.

        Returns:
            (B, h*w, mem_dim).
        """
        binarize = is_from_user and self.config.binarize_prompted and not self.training
        encode = self.memory_encoder.fuse if is_projected else self.memory_encoder
        tokens = encode(vision, low_res_logits, binarize)
        if self.config.is_v21:
            absent = (object_score <= 0).to(tokens.dtype).unsqueeze(-1)
            tokens = tokens + absent * self.no_obj_embed_spatial
        return tokens

    def memory_tokens(self, selection: MemorySelection) -> tuple[Tensor, Tensor, int]:
        """Lay a selection out for the memory attention.

        Returns:
            Tokens (B, M, mem_dim), their positions (1, M, mem_dim), and how many of the last are pointer tokens.
        """
        config, dtype = self.config, self.maskmem_tpos_enc.dtype
        spatial = sine_position(config.feature_size, config.mem_dim, self.maskmem_tpos_enc.device).to(dtype)
        positions = [spatial + self.maskmem_tpos_enc[index, 0] for index, _ in selection.memories]
        tokens = [entry.features.to(dtype) for _, entry in selection.memories]
        split = config.d_model // config.mem_dim
        if selection.pointers:
            pointers = torch.stack([p for _, p in selection.pointers], dim=1)
            tokens.append(pointers.unflatten(-1, (split, config.mem_dim)).flatten(1, 2).to(dtype))
            positions.append(self._pointer_positions(selection).repeat_interleave(split, dim=0))
        return torch.cat(tokens, dim=1), torch.cat(positions).unsqueeze(0), split * len(selection.pointers)

    def _pointer_positions(self, selection: MemorySelection) -> Tensor:
        distances = [distance for distance, _ in selection.pointers]
        if not self.config.is_v21:
            return self.maskmem_tpos_enc.new_zeros(len(distances), self.config.mem_dim)
        reach = max(64, 1 << max(abs(d) for d in distances).bit_length())
        table = pointer_position(reach, selection.pointer_span, self.config.d_model, self.maskmem_tpos_enc.device)
        rows = torch.stack([table[reach + d] for d in distances])
        return self.obj_ptr_tpos_proj(rows.to(self.no_mem_embed.dtype))

    def _read_memory(self, vision: Tensor, selection: MemorySelection) -> Tensor:
        memory, position, num_pointer_tokens = self.memory_tokens(selection)
        prepared = self.memory_attention.prepare(vision)
        x = self.memory_attention.attend(prepared, memory, position, num_pointer_tokens)
        return x.transpose(1, 2).unflatten(-1, vision.shape[-2:])

    def _batch_size(self, features: SliceFeatures, prompts: Prompts, memory: MemoryBank | None) -> int:
        asked = prompts.batch_size or (memory.batch_size if memory is not None else None)
        batch = asked or len(features)
        if len(features) not in (1, batch):
            raise ValueError(
                f"features: expected one slice, or one per object ({batch}), got {len(features)}; "
                "slice or repeat_interleave them"
            )
        return batch

    def _decode(
        self,
        vision: Tensor,
        high_res: tuple[Tensor, Tensor],
        prompts: Prompts,
        batch: int,
        multimask: bool,
        gate: bool,
    ) -> StepOutput:
        sparse, dense = self.sam_prompt_encoder(prompts, batch)
        position = self.sam_prompt_encoder.grid_position()
        return self.decode(vision + dense, high_res, sparse, position, multimask=multimask, gate=gate)

    def decode(
        self,
        image: Tensor,
        high_res: tuple[Tensor, Tensor],
        sparse: Tensor,
        position: Tensor,
        *,
        multimask: bool,
        gate: bool,
    ) -> StepOutput:
        """Masks from conditioned features and encoded prompts.

        Args:
            image: Features with memory and dense prompt, (B or 1, d, h, w).
            high_res: As in :class:`SliceFeatures`, of B slices or of one.
            sparse: Prompt tokens (B, T, d).
            position: The prompt encoder's ``grid_position``.
            multimask: Choose among three masks.
            gate: Make absent objects' masks NO_OBJECT.
        """
        image = image.expand(len(sparse), -1, -1, -1)
        dtype = self.no_mem_embed.dtype
        out: DecoderOutput = self.sam_mask_decoder(image, position.to(dtype), sparse.to(dtype), high_res)
        fall_back = self.config.dynamic_multimask and not self.training
        logits, iou, token = self.sam_mask_decoder.choose(out, multimask, fall_back)
        present = out.object_score > 0
        logits = logits.float()
        if gate:
            logits = torch.where(present[:, :, None, None], logits, NO_OBJECT)
        pointer = torch.where(present, self.obj_ptr_proj(token), self.no_obj_ptr)
        return StepOutput(logits, iou, out.object_score, pointer, out.logits, out.ious)

    def _given_masks_output(self, features: SliceFeatures, masks: Tensor, batch: int) -> StepOutput:
        size = self.config.image_size
        if masks.shape != (batch, 1, size, size):
            raise ValueError(
                f"given_masks: expected ({batch}, 1, {size}, {size}), got {tuple(masks.shape)}; resize and binarise"
            )
        masks = masks.float()
        logits = F.interpolate(
            masks * GIVEN_SCALE + GIVEN_BIAS,
            size=(self.config.mask_size, self.config.mask_size),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        hint = Prompts(masks=self.mask_downsample(masks.to(self.no_mem_embed.dtype)))
        decoded = self._decode(features.vision, features.high_res, hint, batch, multimask=False, gate=False)
        present = (masks.flatten(1) > 0).any(dim=1, keepdim=True)
        pointer = torch.where(present, decoded.object_pointer, self.no_obj_ptr)
        score = present.float() * GIVEN_SCALE + GIVEN_BIAS
        iou = torch.ones_like(score)
        return StepOutput(logits, iou[:, 0], score, pointer, logits, iou)
