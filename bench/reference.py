"""The model as public code would run it: three parts in a row, each in its plain form, on the engine's own weights.

The 3D ViT with naive attention (as MONAI writes it), transformers' `generate` with the LoRA beside the weights, and the
sam2 package's video predictor, object by object. Where a choice is open it is the faster one: our ingest and projector,
questions as one batch, every slice encoded once. In bfloat16 all runs in it but the sam2 package, which keeps float32
weights under autocast, as its authors run it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LogitsProcessor

from medvl_sam2.bench.compiling import swapped
from medvl_sam2.bench.encoder import naive_attention
from medvl_sam2.bench.language import generated, peft_layers, prompt_rows
from medvl_sam2.bench.place import CPU, Place
from medvl_sam2.bench.segmenter import masks_of, quiet, state_of
from medvl_sam2.engine.geometry import Volume
from medvl_sam2.engine.text import requested
from medvl_sam2.model.language import LanguageModel
from medvl_sam2.model.modeling import MedVLSAM2
from medvl_sam2.model.processing import GridTransform, ScanArray, VolumeProcessor
from medvl_sam2.model.prompts import REPORT_REQUEST, SEGMENT_ANSWER
from medvl_sam2.model.sam2 import Prompts, propagate

_CLAMP = 10.0


@dataclass(frozen=True)
class Mask:
    """One object: gated logits (S, m, m) on the slice stack, and the mask (Z, Y, X) on the scan's own grid."""

    logits: Tensor
    voxels: Tensor


class Reference:
    """Runs the parts.

    Args:
        model: Whose vision, projector and bridge are used.
        language: The LLM with its LoRA unmerged.
        package: The sam2 package's video predictor; None runs `model.sam2` slice by slice as the package would, for
            sizes that the package does not have.
        place: Where all of them are already.
    """

    def __init__(self, model: MedVLSAM2, language: LanguageModel, package: nn.Module | None, place: Place = CPU):
        self.model, self.language, self.package, self.place = model, language, package, place
        self.chat, self.processor = model.chat, VolumeProcessor(model.config)

    @torch.inference_mode()
    def segment(self, volume: Volume, names: Sequence[str]) -> list[Mask]:
        """Masks of objects asked for by name."""
        scan = ScanArray(volume.voxels, volume.slope, volume.intercept)
        transform = self.processor.transform(scan)
        hidden = self.seg_states(self.visual_tokens(scan, transform), names)
        images = self.processor.slice_images(scan, transform).to(self.place.device)
        embeddings = self.model.seg_bridge(hidden)
        if self.package is None:
            logits = self._by_model(images.to(self.place.dtype), embeddings)
        else:
            with self.place.autocast():
                logits = self._by_package(images, embeddings)
        return [Mask(one, self._to_voxels(one, transform)) for one in logits]

    @torch.inference_mode()
    def report(self, volume: Volume, tokens: int) -> list[int]:
        """Token ids of a report."""
        scan = ScanArray(volume.voxels, volume.slope, volume.intercept)
        visual = self.visual_tokens(scan, self.processor.transform(scan))
        rows = prompt_rows(self.language, self.chat, visual, self.chat.question(REPORT_REQUEST))
        with peft_layers():
            return generated(self.language.peft, rows, tokens).tokens

    @torch.inference_mode()
    def visual_tokens(self, scan: ScanArray, transform: GridTransform) -> Tensor:
        """(tokens, H) rows for the LLM."""
        grid = self.processor.encoder_grid(scan, transform).to(self.place.device, self.place.dtype)
        with patch("medvl_sam2.model.vision.attention", naive_attention):
            return self.model.visual_tokens(grid[None])[0]

    @torch.inference_mode()
    def seg_states(self, visual: Tensor, names: Sequence[str]) -> Tensor:
        """(B, H) states of [SEG] in the answers to mask requests, which random weights are made to give."""
        chat, answer = self.chat, self.chat.answer(SEGMENT_ANSWER)
        asked = [prompt_rows(self.language, chat, visual, chat.question(requested(name)[1])) for name in names]
        width = max(rows.shape[1] for rows in asked)
        # Padded on the left, as decoders are batched.
        rows = torch.cat([F.pad(rows, (0, 0, width - rows.shape[1], 0)) for rows in asked])
        mask = torch.stack([torch.arange(width) >= width - rows.shape[1] for rows in asked]).long()
        with peft_layers():
            found = self.language.peft.generate(
                inputs_embeds=rows,
                attention_mask=mask.to(rows.device),
                max_new_tokens=len(answer),
                do_sample=False,
                logits_processor=[_Forced(answer)],
                output_hidden_states=True,
                return_dict_in_generate=True,
            )
        step = answer.index(chat.seg_id) + (self.model.config.seg.convention == "input")
        return found.hidden_states[step][-1][:, -1]

    def _by_package(self, images: Tensor, embeddings: Tensor) -> list[Tensor]:
        cached: dict[int, tuple[Tensor, dict[str, Any]]] = {}
        for index, image in enumerate(images.split(1)):
            found = self.package.forward_image(image)
            # The same for every slice, and four times as large as the features.
            positions = cached[0][1]["vision_pos_enc"] if cached else found["vision_pos_enc"]
            cached[index] = (image, {"backbone_fpn": found["backbone_fpn"], "vision_pos_enc": positions})
        return [self._follow({**state_of(images), "cached_features": cached}, token[None]) for token in embeddings]

    def _follow(self, state: dict[str, Any], embedding: Tensor) -> Tensor:
        package = self.package
        outputs = state["output_dict_per_obj"][package._obj_id_to_idx(state, 0)]

        def alone(index: int, run_mem_encoder: bool) -> dict[str, Tensor]:
            return package._run_single_frame_inference(
                state, outputs, index, 1, True, None, None, False, run_mem_encoder=run_mem_encoder
            )[0]

        with prompted(package, embedding), quiet():
            slices = [alone(index, False) for index in range(state["num_frames"])]
            scores = torch.cat([one["object_score_logits"] for one in slices])
            if not self.model.config.seg.use_memory:
                return self._gated(torch.cat([one["pred_masks"][0] for one in slices]), scores)
            start = int(scores.argmax())
            outputs["cond_frame_outputs"][start] = alone(start, True)
            for reverse in (False, True):
                for _ in package.propagate_in_video(state, start, reverse=reverse):
                    pass
        return self._gated(masks_of(outputs), masks_of(outputs, "object_score_logits"))

    def _by_model(self, images: Tensor, embeddings: Tensor) -> list[Tensor]:
        sam2 = self.model.sam2
        features = sam2.encode_images(images)
        found = []
        for token in embeddings.split(1):
            asked = Prompts(embeddings=token)
            logits, scores = sam2.predict_slices(features, asked, gate_by_object_score=False, max_batch=1)
            if self.model.config.seg.use_memory:
                start = int(scores.argmax())
                logits, scores = propagate(sam2, features, {start: asked}, start=start, seg_embeddings=token)
            found.append(self._gated(logits[:, 0], scores))
        return found

    def _gated(self, logits: Tensor, scores: Tensor) -> Tensor:
        """As `Segmentation.gated_logits`."""
        logits = logits.float() - self.model.config.seg.mask_threshold
        return torch.where(scores.reshape(-1, 1, 1) > 0, logits.clamp(-_CLAMP, _CLAMP), -_CLAMP)

    def _to_voxels(self, logits: Tensor, transform: GridTransform) -> Tensor:
        z0, y0, x0, z1, y1, x1 = transform.box
        size = (z1 - z0, y1 - y0, x1 - x0)
        voxels = torch.zeros(transform.shape, dtype=torch.bool)
        voxels[z0:z1, y0:y1, x0:x1] = (F.interpolate(logits[None, None], size, mode="trilinear")[0, 0] > 0).cpu()
        return voxels


@contextmanager
def prompted(package: nn.Module, embedding: Tensor) -> Iterator[None]:
    """Within it every slice of the package is prompted by one more token, (1, E, d)."""
    plain = package.sam_prompt_encoder.forward

    def forward(**prompts: Any) -> tuple[Tensor, Tensor]:
        sparse, dense = plain(**prompts)
        return torch.cat((sparse, embedding), dim=1), dense

    with swapped(package.sam_prompt_encoder, forward):
        yield


class _Forced(LogitsProcessor):
    """Lets `generate` choose nothing but the given tokens, one after the other."""

    def __init__(self, tokens: Sequence[int]):
        self._left = list(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave one choice."""
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._left.pop(0)] = 0
        return forced
