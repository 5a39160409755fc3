"""A lock that is handed on in the order of asking."""

from collections import deque
from threading import Condition, get_ident
from typing import Any


class FairLock:
    """Reentrant lock, first come, first served.

    A stream takes the engine's lock again for every token. With the standard lock it would nearly always win over
    threads that wait, since these have to wake up first; here each of them gets its turn between two tokens.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._queue: deque[object] = deque()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> "FairLock":
        me = get_ident()
        with self._changed:
            if self._owner != me:
                ticket = object()
                self._queue.append(ticket)
                try:
                    self._changed.wait_for(lambda: self._owner is None and self._queue[0] is ticket)
                    self._owner = me
                finally:
                    self._queue.remove(ticket)
            self._depth += 1
        return self

    def __exit__(self, *_: Any) -> None:
        with self._changed:
            self._depth -= 1
            if self._depth == 0:
                self._owner = None
                self._changed.notify_all()
