"""Small things about words: streamed detokenisation, and what a target is called."""

import re

from transformers import PreTrainedTokenizerBase

from medvl_sam2.model.prompts import SEGMENT_REQUEST

_NAMED = re.compile(r"(?:^|[.,;!?]\s+|\band\s+)(?:the\s+)?([A-Za-z][\w /-]*?)\s*:\s*$", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:the|a|an)\s+", re.IGNORECASE)
_ORDER = re.compile(
    r"^(?:please |can you |could you )?(?:segment|show|outline|mark|find|delineate|where (?:is|are)) (?:the )?",
    re.IGNORECASE,
)


class TextStream:
    """Turns token ids into text piece by piece; a character split over tokens waits for its end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.text = ""

    @property
    def tokens(self) -> int:
        """Tokens received."""
        return len(self._ids)

    def push(self, token: int) -> str:
        """Add a token; the text that became certain with it."""
        self._ids.append(token)
        whole = self._decode()
        return self._advance(whole) if not whole.endswith("\ufffd") else ""

    def flush(self) -> str:
        """The text still held back."""
        return self._advance(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)

    def _advance(self, whole: str) -> str:
        piece, self.text = whole[len(self.text) :], whole
        return piece


def requested(target: str) -> tuple[str, str]:
    """Name and request text of a target: a sentence stays as it is, a bare name or description becomes a request."""
    target = " ".join(target.split())
    if target.endswith((".", "?", "!")):
        return _subject(target), target
    name = _ARTICLE.sub("", target)
    return name, SEGMENT_REQUEST.format(name=name) if name else ""


def mask_name(answer: str, request: str) -> str:
    """Name of a mask whose [SEG] follows `answer`: "Liver: " names it, else what was requested does."""
    named = _NAMED.search(answer)
    return named.group(1).lower() if named else _subject(request)


def _subject(request: str) -> str:
    return _ORDER.sub("", request.strip()).rstrip(" .?!")
