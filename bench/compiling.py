"""Baselines that not every machine can run: under torch.compile, or on another runtime."""

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


def add_where_possible(
    sides: MutableMapping[str, Callable[[], Any]], name: str, make: Callable[[], Callable[[], Any]]
) -> None:
    """Add a side after making it and calling it once; what cannot be made or run here is left out with a warning."""
    try:
        side = make()
        side()
    except Exception as error:  # Compilers and other runtimes fail in many ways, which do not concern the other sides.
        logger.warning("%s is left out: %s", name, (str(error).splitlines() or [type(error).__name__])[0])
    else:
        sides[name] = side
