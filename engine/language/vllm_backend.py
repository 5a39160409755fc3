"""Language backend on vLLM: all conversations in flight share each step, and scans their prefix's keys and values.

Optional (`pip install medvl-sam2[vllm]`). vLLM runs in this process, since a [SEG] row must reach SAM2 without leaving
the device.
"""

import itertools
import math
import os
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, RLock
from typing import Any

import torch
from torch import Tensor

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.language.base import Forced, LanguageBackend, Step
from medvl_sam2.engine.vllm_plugin import TAP, architecture, register
from medvl_sam2.model.export import ADAPTER, BASE
from medvl_sam2.model.prompts import ChatTokens

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Bytes for keys, values and activations where the weights alone fill half of a card.
_ROOM = 2 << 30


@dataclass(frozen=True)
class Prefix:
    """What every conversation about a scan begins with.

    Attributes:
        ids: Tokens, with placeholders for the visual rows.
        visual: (tokens, H) on the CPU, where vLLM wants it.
        start: Index of the first visual row.
        salt: Keeps this scan's cached keys and values from all others.
    """

    ids: tuple[int, ...]
    visual: Tensor
    start: int
    salt: str


@dataclass(eq=False)
class Request:
    """One request in flight.

    Attributes:
        key: Its name in vLLM.
        tokens: Generated and not yet taken.
        done: No more will come.
        cached: Tokens of the prompt that the prefix cache had.
    """

    key: str
    tapped: Any
    tokens: deque[int] = field(default_factory=deque)
    done: bool = False
    cached: int = 0


class VLLMBackend(LanguageBackend):
    """Greedy decoding by vLLM.

    Args:
        directory: Of `export_language`.
        chat: Token ids of conversations.
        convention: "input" or "predicting", see `SegConfig.convention`.
        device: Of the other parts; vLLM takes the first CUDA device, or the CPU.
        dtype: Of the LLM.
        **options: Of vLLM's `EngineArgs`.

    Raises:
        InputError: vLLM is not installed, or cannot run this model.
    """

    name = "vllm"
    batch = 256

    def __init__(
        self,
        directory: str | os.PathLike,
        chat: ChatTokens,
        convention: str,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ):
        self.chat, self.convention, self.dtype = chat, convention, dtype
        self._lock = RLock()
        self._numbers = itertools.count()
        self._requests: dict[str, Request] = {}
        self._engine, self._lora, self.hidden_size = _build(Path(directory), device, dtype, options)
        self._limit = self._engine.vllm_config.model_config.max_model_len
        from medvl_sam2.engine.language import vllm_models

        self._inside = vllm_models

    def prefix(self, visual: Tensor) -> Prefix:
        """See `LanguageBackend.prefix`; fills vLLM's prefix cache.

        Raises:
            ValueError: Rows of another shape, or not finite: vLLM would fail at them, with all its requests.
        """
        shape = (self.chat.visual_tokens, self.hidden_size)
        if tuple(visual.shape) != shape:
            raise ValueError(f"visual: expected shape {shape}, got {tuple(visual.shape)}")
        visual = visual.detach().to("cpu", self.dtype)
        if not torch.isfinite(visual).all():
            raise ValueError("visual: expected finite rows, got NaN or infinity; check the scan")
        ids = tuple(self.chat.prefix())
        prefix = Prefix(ids, visual, ids.index(self.chat.context_id), secrets.token_hex(16))
        with self._lock:
            self._finish(self._submit(prefix, [], 1))
        return prefix

    def prefix_bytes(self, prefix: Prefix) -> int:
        """See `LanguageBackend.prefix_bytes`; keys and values are in vLLM's own pool."""
        return prefix.visual.nbytes

    def generate(
        self,
        prefix: Prefix,
        ids: Sequence[int],
        *,
        max_tokens: int = 512,
        cancel: Event | None = None,
        adapter: bool = True,
    ) -> Iterator[Step]:
        """See `LanguageBackend.generate`.

        Args:
            prefix: Of `prefix`.
            ids: Tokens after the prefix.
            max_tokens: Length limit.
            cancel: Ends the stream early once set.
            adapter: With the LoRA, where the directory has one.
        """
        # The state where [SEG] is the input exists when one more token has been sampled.
        later = int(self.convention == "input")
        max_tokens = min(max_tokens, self._limit - len(prefix.ids) - len(ids) - later)
        with self._lock:
            request = self._submit(prefix, ids, max_tokens + later, adapter=adapter)
        try:
            for number in range(max_tokens):
                if cancel is not None and cancel.is_set():
                    return
                token = self._take(request)
                if token is None or token == self.chat.end_id:
                    return
                hidden = None
                if token == self.chat.seg_id:
                    while number + later not in request.tapped.rows:
                        self._step()
                    hidden = request.tapped.rows[number + later]
                request.tapped.rows.pop(number, None)
                yield Step(token, hidden)
        finally:
            with self._lock:
                self._drop(request)

    def forced(
        self,
        prefix: Prefix,
        questions: Sequence[Sequence[int]],
        answer: Sequence[int],
        rivals: Sequence[Sequence[int] | None],
    ) -> list[Forced]:
        """See `LanguageBackend.forced`; every state is the last of a prompt of its own, and all run together."""
        places = [i for i, token in enumerate(answer) if token == self.chat.seg_id]
        upto = [place + (self.convention == "input") for place in places]
        with self._lock:
            submitted = []
            for question, rival in zip(questions, rivals):
                states = [self._submit(prefix, [*question, *answer[:end]], 1) for end in upto]
                begin, weighed = self._submit(prefix, question, 1), None
                if rival is not None:
                    place = next(i for i, (own, other) in enumerate(zip(answer, rival)) if own != other)
                    scores = (answer[place], rival[place])
                    weighed = self._submit(prefix, [*question, *answer[:place]], 1, scores=scores)
                submitted.append((states, begin, weighed))
            results = []
            for states, begin, weighed in submitted:
                hidden = torch.stack([self._finish(request).rows[0] for request in states])
                margin = math.inf if weighed is None else float(self._finish(weighed).margin)
                self._finish(begin)
                results.append(Forced(hidden, margin, begin.tokens[0]))
        return results

    def _submit(
        self,
        prefix: Prefix,
        ids: Sequence[int],
        max_tokens: int,
        *,
        adapter: bool = True,
        scores: tuple[int, int] | None = None,
    ) -> Request:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        key = f"medvl-sam2-{next(self._numbers)}"
        tokens = [*prefix.ids, *ids]
        embeds = torch.zeros(len(tokens), self.hidden_size, dtype=self.dtype)
        stop = prefix.start + len(prefix.visual)
        embeds[prefix.start : stop] = prefix.visual
        is_token = [not prefix.start <= i < stop for i in range(len(tokens))]
        prompt = {
            "prompt_token_ids": tokens,
            "prompt_embeds": embeds,
            "prompt_is_token_ids": is_token,
            "cache_salt": prefix.salt,
        }
        extra = {self._inside.KEY: key} | ({self._inside.SCORES: scores} if scores else {})
        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            stop_token_ids=[self.chat.end_id],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra,
        )
        request = Request(key, self._inside.TAPS.open(key))
        self._requests[key] = request
        try:
            self._engine.add_request(key, prompt, params, lora_request=self._lora if adapter else None)
        except BaseException:
            self._drop(request)
            raise
        return request

    def _take(self, request: Request) -> int | None:
        """Next token of a request; every step serves all requests."""
        while True:
            with self._lock:
                if request.tokens:
                    return request.tokens.popleft()
                if request.done:
                    return None
                self._step()

    def _step(self) -> None:
        with self._lock:
            for output in self._engine.step():
                request = self._requests.get(output.request_id)
                if request is None:
                    continue
                request.tokens += output.outputs[0].token_ids
                request.done = output.finished
                request.cached = max(request.cached, output.num_cached_tokens or 0)

    def _finish(self, request: Request) -> Any:
        """Run a request to its end; what was read of it."""
        try:
            while not request.done:
                self._step()
            return request.tapped
        finally:
            self._drop(request)

    def _drop(self, request: Request) -> None:
        """Forget a request and, where it runs, end it."""
        self._requests.pop(request.key, None)
        self._inside.TAPS.drop(request.key)
        if not request.done:
            self._engine.abort_request([request.key])


def _share(directory: Path, total: int) -> float:
    """Part of a GPU's memory for vLLM; the ViT, SAM2 and its features have the rest."""
    weights = sum(file.stat().st_size for file in directory.rglob("*.safetensors"))
    return min(0.9, max(0.5, (1.2 * weights + _ROOM) / total))


def _build(directory: Path, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any, int]:
    """vLLM's engine, the adapter's request, and the width of the model."""
    # Read when vLLM is imported: rows can only be handed over within one process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # The other runner takes logits processors of another shape.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as error:
        raise InputError(
            f"language_backend: vllm cannot be loaded ({error}); pip install 'medvl-sam2[vllm]', or use transformers"
        ) from error
    from peft import PeftConfig
    from transformers import AutoConfig

    if device.type == "cuda" and dtype == torch.float32 and (directory / ADAPTER).is_dir():
        raise InputError(
            "dtype: expected bfloat16 or float16 for vLLM with a LoRA on CUDA, got float32; "
            "take another dtype or merge the LoRA (convert --for vllm --merge)"
        )
    register()
    config = AutoConfig.from_pretrained(directory / BASE)
    adapter = directory / ADAPTER
    lora: dict[str, Any] = {}
    if adapter.is_dir():
        rank = PeftConfig.from_pretrained(adapter).r
        # vLLM's CPU operations give a request without adapter the last slot, so that one must stay empty.
        lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": next(r for r in _RANKS if r >= rank)}
    settings = {
        "model": str(directory / BASE),
        "skip_tokenizer_init": True,
        "enable_prompt_embeds": True,
        "enable_prefix_caching": True,
        # A step launched ahead would move the rows before they are read.
        "async_scheduling": False,
        "hf_overrides": {"architectures": [architecture(config.architectures[0])]},
        "logits_processors": [TAP],
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": config.max_position_embeddings,
        "enforce_eager": device.type == "cpu",
        **lora,
    }
    if device.type == "cpu":
        # The default of 128 tokens would leave much of a scan's prefix out of the cache.
        settings["block_size"] = 32
    else:
        settings["gpu_memory_utilization"] = _share(directory, torch.cuda.get_device_properties(device).total_memory)
    engine = LLMEngine.from_engine_args(EngineArgs(**settings | options))
    request = LoRARequest("medvl-sam2", 1, str(adapter)) if lora else None
    return engine, request, config.hidden_size
