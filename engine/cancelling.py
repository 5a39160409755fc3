"""How work is given up half way: whoever waits sets an event, and the work looks at it between two pieces."""

from threading import Event


class Cancelled(Exception):
    """A request was given up before it was done."""


class Linked(Event):
    """An event of one's own that counts as set once another is, too; setting it leaves the other as it is.

    `wait` waits for its own setting alone.

    Args:
        other: The caller's, which may serve several requests; None for none.
    """

    def __init__(self, other: Event | None):
        super().__init__()
        self._other = other

    def is_set(self) -> bool:
        """Whether this one or the other is set."""
        return super().is_set() or (self._other is not None and self._other.is_set())


def check(cancel: Event | None) -> None:
    """Go on, or give up.

    Raises:
        Cancelled: The event is set.
    """
    if cancel is not None and cancel.is_set():
        raise Cancelled("the request was given up")
