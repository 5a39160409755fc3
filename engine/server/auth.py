"""API keys, and the middleware that asks for them."""

import hashlib
import hmac
import ipaddress
import os
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.server.errors import ApiError

VARIABLE = "MEDVL_SAM2_API_KEYS"
LOCAL = "local"
"""Owner of everything where no keys are set."""

_OPEN = ("/health", "/docs", "/openapi.json")
_UPLOADS = "/v1/volumes"


class ApiKeys:
    """The keys that open the server; only their digests are kept.

    Args:
        keys: As the users send them.
    """

    def __init__(self, keys: list[str]):
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def load(cls, path: Path | None = None) -> "ApiKeys":
        """Read keys from a file (one a line, # begins a comment) and from `MEDVL_SAM2_API_KEYS` (commas between).

        Raises:
            InputError: The file cannot be read or holds no key, or a key is shorter than 16 characters.
        """
        keys = [key.strip() for key in os.environ.get(VARIABLE, "").split(",") if key.strip()]
        if path is not None:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeError) as error:
                raise InputError(f"{path}: the keys cannot be read ({error}); give a text file") from error
            found = [line.split("#")[0].strip() for line in lines]
            if not any(found):
                raise InputError(f"{path}: holds no key; write one a line")
            keys += filter(None, found)
        if short := [key for key in keys if len(key) < 16]:
            raise InputError(f"API keys: {len(short)} of {len(keys)} have fewer than 16 characters; make longer ones")
        return cls(keys)

    def __len__(self) -> int:
        return len(self._digests)

    def owner(self, key: str) -> str | None:
        """Who a key belongs to; None for an unknown key. Takes the same time for every key."""
        given = _digest(key)
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return given.hex()[:32] if any(matches) else None


def check_host(host: str, keys: ApiKeys) -> None:
    """Refuse to serve the network without keys.

    Raises:
        InputError: Another host than loopback, and no keys.
    """
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not len(keys):
        raise InputError(f"host: {host} can be reached by others; set API keys (--keys FILE or {VARIABLE}) first")


class Gate:
    """Middleware that lets in who has a key, and bounds the bodies of JSON requests.

    It stands before the body is read, which FastAPI does ahead of a route's own checks.

    Args:
        app: What lies behind.
        keys: Who may come in; anyone when empty.
        max_body: Bytes of a JSON request.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, max_body: int):
        self.app, self.keys, self.max_body = app, keys, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            scope.setdefault("state", {})["owner"] = self._owner(scope["path"], headers)
            if not (scope["method"] == "POST" and scope["path"].rstrip("/") == _UPLOADS):
                receive = self._bounded(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _owner(self, path: str, headers: dict[bytes, str]) -> str:
        if not len(self.keys) or path in _OPEN:
            return LOCAL
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        owner = self.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise ApiError(
                401,
                "invalid_api_key",
                "expected a valid key in the header Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer"},
            )
        return owner

    def _bounded(self, headers: dict[bytes, str], receive: Receive) -> Receive:
        stated = headers.get(b"content-length", "0")
        if not stated.isdecimal() or int(stated) > self.max_body:
            raise ApiError(413, "too_large", f"body: expected at most {self.max_body} bytes, got {stated}")
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body:
                raise ApiError(413, "too_large", f"body: expected at most {self.max_body} bytes, got more")
            return message

        return counted


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
