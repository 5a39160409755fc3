"""The conversation layout: InternVL2.5's chat template around the visual tokens.

Every piece is tokenised on its own, so a sequence built for training and one built turn by turn at run time have the
same ids. The part before the first question is constant for a scan: its keys and values are computed once.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

SEG = "[SEG]"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

REPORT_REQUEST = "Write a report of this CT scan."
SEGMENT_REQUEST = "Segment the {name}."
SEGMENT_ANSWER = "It is [SEG]."
ABSENT_ANSWER = "There is no {name} in this scan."
MULTIPLE_CHOICE = "{question} Choices: {choices}"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def with_choices(question: str, choices: list[str] | tuple[str, ...]) -> str:
    """Question text with its choices as `A. … B. …` (M3D-VQA's closed form).

    Raises:
        ValueError: More choices than letters.
    """
    if len(choices) > len(LETTERS):
        raise ValueError(f"choices: expected at most {len(LETTERS)}, one a letter, got {len(choices)}; ask of fewer")
    lettered = " ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))
    return MULTIPLE_CHOICE.format(question=question, choices=lettered)


@dataclass(frozen=True)
class ChatTokens:
    """Token ids of the conversation's pieces.

    Args:
        tokenizer: Knows the chat tokens, <img>, </img>, <IMG_CONTEXT> and [SEG].
        system: System message.
        visual_tokens: Rows that the projector gives for one scan.
    """

    tokenizer: PreTrainedTokenizerBase
    system: str
    visual_tokens: int

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    @property
    def seg_id(self) -> int:
        """Id of [SEG]."""
        return self.tokenizer.convert_tokens_to_ids(SEG)

    @property
    def context_id(self) -> int:
        """Id of the placeholder that visual rows replace."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)

    @property
    def end_id(self) -> int:
        """Id that ends a turn."""
        return self.tokenizer.convert_tokens_to_ids(TURN_END)

    def prefix(self) -> list[int]:
        """System message, start of the user's turn and the visual placeholders."""
        head = f"{TURN_START}system\n{self.system}{TURN_END}\n{TURN_START}user\n{IMAGE_START}"
        return [*self._encode(head), *[self.context_id] * self.visual_tokens, *self._encode(f"{IMAGE_END}\n")]

    def question(self, text: str, *, first: bool = True) -> list[int]:
        """A question up to where the answer begins; `first` when it follows the prefix directly."""
        head = "" if first else f"\n{TURN_START}user\n"
        return self._encode(f"{head}{text}{TURN_END}\n{TURN_START}assistant\n")

    def answer(self, text: str) -> list[int]:
        """An answer with the token that ends the turn."""
        return [*self._encode(text), self.end_id]
