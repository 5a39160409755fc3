"""Measures text generation beside what one would run otherwise: transformers' `generate` with unmerged PEFT LoRA.

All sides have the same random weights and answer the same request about the same made-up scan, greedily. Nothing is
timed before they agree on every token; in bfloat16, where near ties fall either way, before every token of every side
is one that float32 might have said at its place. vLLM is a side where it is installed. The floor of a token is the time
to read all weights that it needs, at the rate of a large copy in the same run.
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from peft.tuners import lora as peft_lora
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from medvl_sam2.bench.compiling import add_where_possible, swapped
from medvl_sam2.bench.kernels import Row
from medvl_sam2.bench.place import CPU, Place
from medvl_sam2.bench.rows import Check, judged
from medvl_sam2.bench.timing import copy_rate, synchronise
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.language.base import LanguageBackend
from medvl_sam2.engine.language.transformers import TransformersBackend
from medvl_sam2.model.config import LanguageConfig, LoRAConfig, ProjectorConfig
from medvl_sam2.model.export import export_language
from medvl_sam2.model.language import LanguageModel, LoRALinear
from medvl_sam2.model.modeling import WEIGHTS, cast_weights
from medvl_sam2.model.presets import preset
from medvl_sam2.model.prompts import REPORT_REQUEST, ChatTokens

UNMERGED, MERGED, COMPILED, OURS = "transformers, LoRA", "transformers, merged", "transformers, compiled", "ours"
VLLM = "vLLM, merged"
# A token in bfloat16 is right when no other has a larger logit by more than this in float32, in standard deviations of
# the logits: of 150,000 random ones the handful at the top lie within it.
NEAR_TIE = 0.25


@dataclass
class Decoded:
    """An answer and when its tokens came, in seconds from the start."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def per_token(self) -> float:
        """Seconds per token after the first one."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


class Clock:
    """Takes `generate`'s tokens as they come, as transformers' streamers do."""

    def __init__(self) -> None:
        self.answer, self._start = Decoded(), time.perf_counter()
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if self._has_prompt:
            self.answer.tokens += value.flatten().tolist()
            self.answer.times.append(time.perf_counter() - self._start)
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is left to do."""


def run(
    *,
    name: str = "1b-fast",
    config: LanguageConfig | None = None,
    lora: LoRAConfig | None = None,
    visual_tokens: int = ProjectorConfig().tokens,
    tokens: int = 32,
    rounds: int = 5,
    compile: bool = False,
    place: Place = CPU,
) -> list[Row]:
    """Time the sides.

    Args:
        name: Preset whose LLM and LoRA are taken.
        config: An LLM instead of the preset's.
        lora: A LoRA instead of the preset's.
        visual_tokens: Rows of the scan ahead of the request.
        tokens: Length of the answer, 2 or more.
        rounds: Times that each side runs; the median counts.
        compile: Measure `generate` on a static cache under torch.compile too, where that works here.
        place: Where the sides run.

    Returns:
        One dict per side for a decoded token, and one for the time to the first token of a scan that was asked about
        before; see `medvl_sam2.bench.rows.judged`.

    Raises:
        ValueError: Fewer than two tokens.
    """
    if tokens < 2:
        raise ValueError(f"tokens: expected 2 or more, got {tokens}")
    shape, adapter = config or preset(name).language, lora or preset(name).lora
    tokenizer = shipped_tokenizer()
    chat = ChatTokens(tokenizer, shape.system, visual_tokens)
    plain = random_language(shape, adapter, chat)
    scan = torch.randn(visual_tokens, shape.hidden_size, generator=torch.Generator().manual_seed(2))
    asked = chat.question(REPORT_REQUEST)
    exact = copy.deepcopy(plain) if place != CPU else None
    sides = make_sides(plain, chat, scan, tokens, place)
    if compile:
        add_where_possible(sides, COMPILED, lambda: _compiled(plain, prompt_rows(plain, chat, scan, asked), tokens))
    # Exported anew: the backend above has merged its copy, and cast it.
    add_where_possible(sides, VLLM, lambda: _by_vllm(exact or plain, chat, scan, tokens, place))
    answers = {side: answer().tokens for side, answer in sides.items()}
    if exact is None:
        checks = {side: compared(answer, answers[UNMERGED], tokens) for side, answer in answers.items()}
    else:
        checks = near_exact(answers, exact, prompt_rows(exact, chat, scan, asked), tokens)
    rate = copy_rate(device=place.device)
    decode: dict[str, list[float]] = {side: [] for side in sides}
    first: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, answer in sides.items():
            synchronise(place.device)
            found = answer()
            decode[side].append(found.per_token)
            first[side].append(found.times[0])
    layers, width = shape.config["num_hidden_layers"], shape.hidden_size
    work = f"decode a token, {layers}x{width}, LoRA r={adapter.rank}"
    shown = f"{rate / 1e9:.1f} GB/s"
    rows = judged(work, decode, checks, floor=weight_bytes(plain.causal) / rate, rate=shown, place=place)
    for row in rows:
        row["per_second"] = 1 / row["seconds"]
    return rows + judged(f"first token after {visual_tokens} visual tokens", first, checks, place=place)


def make_sides(
    plain: LanguageModel, chat: ChatTokens, scan: Tensor, tokens: int, place: Place = CPU
) -> dict[str, Callable[[], Decoded]]:
    """`generate` with the LoRA beside the weights, `generate` with it merged, and our backend.

    Args:
        plain: Is moved and cast, and otherwise stays as it is.
        chat: Token ids.
        scan: (tokens, H) rows of the projector.
        tokens: Length of the answers.
        place: Where all sides run.
    """
    merged = twin(plain)
    # Merged in float32, so that the sum is rounded once, as the engine does it.
    backend = TransformersBackend(merged, chat, "input")
    for model in (plain, merged):
        cast_weights(model.to(place.device), place.dtype)
    asked = chat.question(REPORT_REQUEST)

    def unmerged() -> Decoded:
        with peft_layers():
            return generated(plain.peft, prompt_rows(plain, chat, scan, asked), tokens)

    return {
        UNMERGED: unmerged,
        MERGED: lambda: generated(merged.causal, prompt_rows(merged, chat, scan, asked), tokens),
        OURS: _by_backend(backend, chat, scan, tokens),
    }


def peft_layers() -> AbstractContextManager:
    """Within it layers with LoRA run PEFT's own forward, not the model's, which on CUDA is one kernel of ours."""
    return patch.object(LoRALinear, "forward", peft_lora.Linear.forward)


def _by_backend(backend: LanguageBackend, chat: ChatTokens, scan: Tensor, tokens: int) -> Callable[[], Decoded]:
    asked = chat.question(REPORT_REQUEST)
    # A session keeps it from the first question on.
    prefix = backend.prefix(scan)

    def answer() -> Decoded:
        found, start = Decoded(), time.perf_counter()
        for step in backend.generate(prefix, asked, max_tokens=tokens):
            found.tokens.append(step.token)
            found.times.append(time.perf_counter() - start)
        return found

    return answer


def _by_vllm(
    language: LanguageModel, chat: ChatTokens, scan: Tensor, tokens: int, place: Place
) -> Callable[[], Decoded]:
    """The same through vLLM, which keeps the scan's keys and values too.

    Raises:
        InputError: vLLM is not installed, or cannot run this model.
    """
    # Before the weights are written for it.
    if find_spec("vllm") is None:
        raise InputError("vllm: expected it installed, got none; pip install 'medvl-sam2[vllm]'")
    if place.device.index:
        raise InputError(f"device: expected the first one, which vLLM takes, got {place.device}; hide the others")
    from medvl_sam2.engine.language.vllm_backend import VLLMBackend

    length = len(chat.prefix()) + len(chat.question(REPORT_REQUEST)) + tokens + 1
    with TemporaryDirectory(prefix="medvl_sam2_") as folder:
        directory = export_language(language, folder, merge=True)
        backend = VLLMBackend(directory, chat, "input", device=place.device, dtype=place.dtype, max_model_len=length)
    return _by_backend(backend, chat, scan, tokens)


def _compiled(plain: LanguageModel, rows: Tensor, tokens: int) -> Callable[[], Decoded]:
    """`generate` under torch.compile on a static cache."""
    compiled = torch.compile(plain.causal.forward)

    def side() -> Decoded:
        with peft_layers(), swapped(plain.causal, compiled):
            return generated(plain.peft, rows, tokens, cache_implementation="static")

    return side


def generated(model: torch.nn.Module, rows: Tensor, tokens: int, **options: Any) -> Decoded:
    """Greedy answer of transformers' `generate` to (1, T, H) rows."""
    clock = Clock()
    with torch.inference_mode():
        model.generate(
            inputs_embeds=rows,
            max_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
            **options,
        )
    return clock.answer


@torch.inference_mode()
def prompt_rows(model: LanguageModel, chat: ChatTokens, scan: Tensor, question: Iterable[int]) -> Tensor:
    """(1, T, H) input rows of a question about a scan."""
    ids = torch.tensor([[*chat.prefix(), *question]], device=model.seg_input.device)
    rows = model.embed(ids)
    place = (ids == chat.context_id)[..., None].expand_as(rows)
    return rows.masked_scatter(place, scan.to(rows))


def random_language(config: LanguageConfig, lora: LoRAConfig, chat: ChatTokens) -> LanguageModel:
    """An LLM with random weights whose answer depends on what it is asked and on the LoRA, and never ends by itself."""
    torch.manual_seed(0)
    model = LanguageModel(config, lora).eval().requires_grad_(False)
    with torch.inference_mode(False), torch.no_grad():
        for name, parameter in model.named_parameters():
            # As initialised, LoRA adds nothing and the states are nearly the same at every position.
            if "lora_B" in name:
                parameter.normal_(std=0.02)
            elif parameter.ndim == 2 and "lora_" not in name and "embed" not in name and "lm_head" not in name:
                parameter.mul_(2)
        model.bake()
        model.causal.get_output_embeddings().weight[chat.end_id] = 0
    model.causal.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


def twin(model: LanguageModel) -> LanguageModel:
    """A copy that may be merged; the embeddings, which merging leaves alone, are shared."""
    shared = (model.causal.get_input_embeddings().weight, model.causal.get_output_embeddings().weight)
    return copy.deepcopy(model, {id(weight): weight for weight in shared})


def shipped_tokenizer() -> PreTrainedTokenizerBase:
    """The tiny preset's tokenizer: it knows the chat's tokens, and random weights need no more of it."""
    return AutoTokenizer.from_pretrained(WEIGHTS / "tiny")


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the base weights that one decoded token reads: all but the input embedding, of which it reads a row."""
    rows = model.get_input_embeddings().weight
    kept = {id(p): p.nbytes for name, p in model.named_parameters() if ".lora_" not in name}
    if model.get_output_embeddings().weight is not rows:
        del kept[id(rows)]
    return sum(kept.values())


def compared(got: Sequence[int], want: Sequence[int], length: int) -> Check:
    """Whether two answers of a length are the same; the error is the share of tokens that differ."""
    wrong = length - sum(a == b for a, b in zip(got, want))
    return Check(wrong == 0 and len(got) == len(want) == length, wrong / length)


def near_exact(
    answers: Mapping[str, Sequence[int]], exact: LanguageModel, rows: Tensor, length: int
) -> dict[str, Check]:
    """Whether all tokens of answers are ones that float32 might have said, too; the error is the share that are not.

    Args:
        answers: Token ids by side.
        exact: The same weights in float32.
        rows: (1, T, H) input rows of the request, see `prompt_rows`.
        length: Tokens that each answer was to have.
    """
    checks = {}
    for side, answer in answers.items():
        wrong = length - int((regrets(exact, rows, answer) <= NEAR_TIE).sum())
        checks[side] = Check(wrong == 0 and len(answer) == length, wrong / length)
    return checks


@torch.inference_mode()
def regrets(exact: LanguageModel, rows: Tensor, answer: Sequence[int]) -> Tensor:
    """(N,) how far the logit of each token of an answer lies below the best, in standard deviations of the logits.

    Args:
        exact: Reads the answer in one pass, every token after those before it.
        rows: (1, T, H) input rows of the request.
        answer: N token ids.
    """
    ids = torch.tensor([list(answer)], device=rows.device)
    whole = torch.cat((rows, exact.embed(ids[:, :-1])), dim=1)
    logits = exact.logits(exact.hidden(whole)[0, rows.shape[1] - 1 :])
    said = logits.gather(1, ids.mT)[:, 0]
    return (logits.max(-1).values - said) / logits.std(-1)
