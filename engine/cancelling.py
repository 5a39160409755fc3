"""How work is given up half way: whoever waits sets an event, and the work looks at it between two pieces."""

from threading import Event


class Cancelled(Exception):
    """A request was given up before it was done."""


def check(cancel: Event | None) -> None:
    """Go on, or give up.

    Raises:
        Cancelled: The event is set.
    """
    if cancel is not None and cancel.is_set():
        raise Cancelled("the request was given up")
