"""Several question-and-answer turns behind one scan's visual tokens, as one sequence.

Each turn sees the scan and itself but no other turn, and counts its positions from the end of the prefix, so every
turn trains exactly as it will be asked at run time, while the costly visual part is computed once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from medvl_sam2.model.prompts import ChatTokens

IGNORE = -100


@dataclass
class TextBatch:
    """Packed sequences.

    Attributes:
        input_ids: (B, T).
        position_ids: (B, T).
        attention_mask: (B, 1, T, T) bool, True where a query may look.
        labels: (B, T), -100 outside answers.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "TextBatch":
        """Copy on a device."""
        return TextBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def pack(chat: ChatTokens, conversations: list[list[tuple[str, str]]]) -> TextBatch:
    """Pack turns.

    Args:
        chat: Token ids of the conversation's pieces.
        conversations: Per scan its (question, answer) turns; [SEG] tokens keep this order.
    """
    rows = [_row(chat, turns) for turns in conversations]
    length = max(len(ids) for ids, *_ in rows)
    ids = torch.full((len(rows), length), chat.end_id)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORE)
    # Turn -1 is padding: it sees only itself, since a row without any key would be NaN.
    turn = torch.full((len(rows), length), -1)
    for i, (row_ids, row_positions, row_labels, row_turn) in enumerate(rows):
        n = len(row_ids)
        ids[i, :n] = torch.tensor(row_ids)
        positions[i, :n] = torch.tensor(row_positions)
        labels[i, :n] = torch.tensor(row_labels)
        turn[i, :n] = torch.tensor(row_turn)
    same = turn[:, :, None] == turn[:, None, :]
    prefix = (turn[:, None, :] == 0) & (turn[:, :, None] > 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = ((same & (turn[:, :, None] >= 0)) | prefix) & causal
    mask |= torch.eye(length, dtype=torch.bool)
    return TextBatch(ids, positions, mask[:, None], labels)


def _row(chat: ChatTokens, turns: list[tuple[str, str]]) -> tuple[list[int], list[int], list[int], list[int]]:
    ids = chat.prefix()
    start = len(ids)
    positions = list(range(start))
    labels, turn = [IGNORE] * len(ids), [0] * len(ids)
    for number, (question, answer) in enumerate(turns, start=1):
        asked, told = chat.question(question), chat.answer(answer)
        ids += asked + told
        positions += range(start, start + len(asked) + len(told))
        labels += [IGNORE] * len(asked) + told
        turn += [number] * (len(asked) + len(told))
    return ids, positions, labels, turn
