"""Errors as OpenAI's clients read them."""

import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from medvl_sam2.engine.cancelling import Cancelled
from medvl_sam2.engine.geometry import InputError

logger = logging.getLogger(__name__)
CLIENT_GONE = 499
"""nginx's status for a client that hung up; seen in metrics only."""


class ErrorDetail(BaseModel):
    """What went wrong and what to do."""

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(BaseModel):
    """Body of every answer of 400 and above."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer of 400 or above.

    Args:
        status: HTTP status.
        code: Reason as a word, for programs.
        message: Reason and remedy as a sentence, for people.
        headers: Of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """JSON form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return ErrorBody(error=ErrorDetail(message=self.message, type=kind, code=self.code)).model_dump()

    def response(self) -> JSONResponse:
        """As an answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def disk_full(cause: Exception) -> ApiError:
    """The answer when a file of the server's own cannot be written; the cause is logged."""
    logger.error("the disk takes no more: %s", cause)
    return ApiError(507, "disk_full", "the server could not store the file; come again later")


def as_api_error(error: Exception) -> ApiError:
    """The answer to an exception; what is not the user's doing is logged, and not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Cancelled):
        # Seen by those who still wait alone, whose work only the end of the server cancels.
        return ApiError(503, "cancelled", "the server is shutting down; come again", {"Retry-After": "30"})
    if isinstance(error, InputError):
        return ApiError(400, "invalid_input", str(error))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal_error", "the server failed at this request; its log says why")


def responses(*statuses: int) -> dict[int | str, dict[str, object]]:
    """OpenAPI entries of the errors of a route, those that any route can give included."""
    common = (400, 401, 413, 422)
    return {s: {"model": ErrorBody, "description": HTTPStatus(s).phrase} for s in sorted({*common, *statuses})}


def install(app: FastAPI) -> None:
    """Give every error of an app this form."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        answer = ApiError(422, "invalid_request", f"{place}: {first['msg']}")
        body = answer.body()
        body["error"]["param"] = place
        return JSONResponse(body, 422)

    async def http(_: Request, error: HTTPException) -> JSONResponse:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        return ApiError(error.status_code, code, str(error.detail), error.headers).response()

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(InputError, known)
    app.add_exception_handler(Cancelled, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, known)
