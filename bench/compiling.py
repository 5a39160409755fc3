"""Baselines under torch.compile, where the compiler takes them."""

import logging
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


@contextmanager
def swapped(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it a module runs another forward."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def add_compiled(sides: MutableMapping[str, Callable[[], Any]], name: str, side: Callable[[], Any]) -> None:
    """Add a compiled side after calling it once; what the compiler refuses is left out with a warning."""
    try:
        side()
    except Exception as error:  # It fails in many ways, none of which concerns the other sides.
        logger.warning("%s is left out: %s", name, (str(error).splitlines() or [type(error).__name__])[0])
    else:
        sides[name] = side
