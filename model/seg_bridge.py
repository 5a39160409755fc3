"""The bridge from the LLM to SAM2: a [SEG] hidden state becomes one more sparse prompt token."""

import torch
from torch import Tensor, nn


class SegBridge(nn.Module):
    """Linear, ReLU, linear (Sa2VA's and LISA's `text_hidden_fcs`)."""

    def __init__(self, hidden_size: int, prompt_size: int):
        super().__init__()
        self.text_hidden_fcs = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, prompt_size)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, H) hidden states -> (N, 1, d) sparse prompt tokens."""
        return self.text_hidden_fcs(hidden)[:, None]


def seg_positions(input_ids: Tensor, seg_token_id: int, convention: str) -> tuple[Tensor, Tensor]:
    """Where the prompting hidden states lie.

    Args:
        input_ids: (B, T).
        seg_token_id: Id of [SEG].
        convention: "input" (at [SEG]) or "predicting" (the position before it).

    Returns:
        Sample indices (N,) and positions (N,), in reading order.
    """
    sample, position = torch.nonzero(input_ids == seg_token_id, as_tuple=True)
    return sample, position - int(convention == "predicting")
