"""What is said of phantoms, without a volume: facts drawn as phantoms have them, texts, and the tokenizer made of them.

The texts hold no images: each chat either writes a report, or answers questions and segmentation requests about a
report given before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from medvl_sam2.model.config import LanguageConfig
from medvl_sam2.model.prompts import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, SEG, TURN_END, TURN_START
from medvl_sam2.training.phantom import check_training_seed
from medvl_sam2.training.questions import make_questions
from medvl_sam2.training.reports import write_report
from medvl_sam2.training.requests import make_requests
from medvl_sam2.training.templates import REPORT_PROMPTS
from medvl_sam2.training.terms import ENLARGED, FINDING_TERMS, PHASES, PLACES, REGION_SECTIONS, STRUCTURE_TERMS

SPECIAL_TOKENS = ("<|endoftext|>", TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT, SEG)
"""Their ids are their positions, 0 to 6, in every tokenizer of `train_tokenizer`."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPLIT = r"\p{N}|'(?i:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def chat_text(turns: Iterable[tuple[str, str]], system: str = LanguageConfig.system) -> str:
    """Return a finished conversation of (user, assistant) turns in the layout of `CHAT_TEMPLATE` and `ChatTokens`."""
    messages = [("system", system)]
    for user, assistant in turns:
        messages += [("user", user), ("assistant", assistant)]
    return "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in messages)


def synthetic_facts(rng: np.random.Generator) -> dict[str, Any]:
    """Draw facts as a phantom has them, without a volume: for text-only training and for tests.

    Returns:
        A dict with the keys of `Phantom.facts`. Volumes and sizes are plausible, not measured.
    """
    region = str(rng.choice(list(REGION_SECTIONS)))
    sections = REGION_SECTIONS[region]
    removed = [
        organ
        for organ, chance in {"gallbladder": 0.12, "spleen": 0.05, "left kidney": 0.05, "right kidney": 0.05}.items()
        if STRUCTURE_TERMS[organ].section in sections and rng.random() < chance
    ]
    if {"left kidney", "right kidney"} <= set(removed):
        removed.remove("left kidney")
    structures = {}
    for name, term in STRUCTURE_TERMS.items():
        if name in removed or (term.section != "bones" and term.section not in sections and name != "aorta"):
            continue
        whole = term.section in sections and name != "aorta" and rng.random() < 0.9
        fraction = 1.0 if whole else float(rng.uniform(0.05, 0.95))
        structures[name] = {"volume_ml": round(fraction * float(rng.uniform(5, 1500)), 1), "fraction": fraction}
    findings = [
        {"type": "absent_organ", "side": None, "organ": organ, "location": None, "size_mm": None, "volume_ml": 0.0}
        for organ in removed
    ]
    for kind, term in FINDING_TERMS.items():
        for side in ("left", "right") if term.sided else (None,):
            organ = term.organs[0].format(side=side)
            if organ not in structures or term.section not in sections or rng.random() > 0.12:
                continue
            if kind in ENLARGED and structures[organ]["fraction"] < 0.9:
                continue
            places = PLACES.get(kind, (None,))
            findings += [
                {
                    "type": kind,
                    "side": side,
                    "organ": organ,
                    "location": places[int(rng.integers(len(places)))],
                    "size_mm": round(float(rng.uniform(4, 50)), 1) if term.large_mm else None,
                    "volume_ml": round(float(rng.uniform(0.1, 900)), 1) if term.masked else None,
                }
                for _ in range(1 + (kind in ("lung_nodule", "liver_lesion") and rng.random() < 0.3))
            ]
    return {
        "seed": int(rng.integers(1_000_000)),
        "region": region,
        "phase": str(rng.choice(PHASES)),
        "sex": str(rng.choice(("female", "male"))),
        "structures": structures,
        "removed": removed,
        "findings": findings,
    }


def text_corpus(
    seeds: Iterable[int], facts_of: Callable[[int], dict[str, Any]] | None = None, turns: int = 6
) -> Iterator[str]:
    """Yield conversations, about six for each seed, in the order of the seeds.

    Args:
        seeds: One phantom each. Evaluation seeds (>= 1,000,000) are refused.
        facts_of: Gives the facts of a seed; by default `synthetic_facts` of a generator with that seed.
        turns: Most questions and requests behind one report.

    Raises:
        ValueError: If a seed is kept for evaluation.
    """
    for seed in seeds:
        check_training_seed(seed)
        rng = np.random.default_rng(seed)
        facts = facts_of(seed) if facts_of else synthetic_facts(rng)
        report = write_report(facts, rng)
        yield chat_text([(REPORT_PROMPTS[int(rng.integers(len(REPORT_PROMPTS)))], report)])
        pairs = [(question.prompt, question.answer) for question in make_questions(facts, rng)]
        pairs += [(request.text, request.answer) for request in make_requests(facts, rng)]
        pairs = [pairs[int(index)] for index in rng.permutation(len(pairs))]
        for start in range(0, len(pairs), turns):
            (first, answer), *rest = pairs[start : start + turns]
            yield chat_text([(f"{report}\n{first}", answer), *rest])


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text round-trips, digits stay single, special tokens have fixed ids.

    Args:
        texts: Training texts; special tokens in them count as borders.
        vocab_size: Number of ids, special tokens and the 256 bytes included.

    Returns:
        A tokenizer with end of text "<|im_end|>", padding "<|endoftext|>" and the ChatML template.

    Raises:
        ValueError: If the vocabulary cannot hold the bytes and the special tokens.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size: expected at least {256 + len(SPECIAL_TOKENS)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (TURN_END, "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
