"""Progress bars on stderr; quiet when it is not a terminal."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def bar(title: str, steps: Sequence[str]) -> Iterator[Callable[[], None]]:
    """A bar over named steps.

    Args:
        title: Shown first.
        steps: Names, in order.

    Yields:
        Function to call when a step is done.
    """
    names = iter(steps)
    with tqdm(total=len(steps), desc=title, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as progress:
        progress.set_postfix_str(next(names))

        def done() -> None:
            progress.update()
            progress.set_postfix_str(next(names, ""))

        yield done
