"""What comes in: the file of a request's body, and what it must look like before anything reads it whole."""

import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import nibabel as nib
import numpy as np
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from medvl_sam2.engine.server.errors import ApiError
from medvl_sam2.engine.server.settings import ServerSettings

_RAW = ("application/octet-stream", "application/gzip", "application/x-gzip", "application/zip")
_NIFTI_SIZES = (348, 540)
_LONGEST_NAME = 200


class Upload:
    """The one file of a request, as a stream.

    Takes the file as the raw body, or as the first file of a multipart form.

    Args:
        request: Its body has not been read.

    Raises:
        ApiError: 415 for another kind of body, 400 for a form without a boundary.
    """

    def __init__(self, request: Request):
        self._request = request
        self.name = request.query_params.get("name", "scan")[:_LONGEST_NAME]
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        self._form: _Form | None = None
        if kind == b"multipart/form-data":
            if not options.get(b"boundary"):
                raise ApiError(400, "invalid_upload", "body: expected a multipart form with a boundary")
            self._form = _Form(options[b"boundary"])
        elif kind.decode("latin-1") not in _RAW:
            expected = ", ".join(("multipart/form-data", *_RAW))
            raise ApiError(415, "unsupported_media_type", f"content-type: expected one of {expected}")

    async def chunks(self) -> AsyncIterator[bytes]:
        """The file's bytes as they arrive.

        Raises:
            ApiError: 400 for a form that is damaged, or holds no file or several.
        """
        async for data in self._request.stream():
            if self._form is None:
                yield data
                continue
            for piece in self._form.feed(data):
                yield piece
        if self._form is not None:
            self._form.finish()
            self.name = self._form.name or self.name


class _Form:
    """Takes the file out of a multipart form, piece by piece."""

    def __init__(self, boundary: bytes):
        self.name = ""
        self._pieces: list[bytes] = []
        self._field, self._value = b"", b""
        self._files, self._inside, self._ended = 0, False, False
        self._parser = MultipartParser(
            boundary,
            {
                "on_header_field": self._on_field,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_part_data": self._on_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> list[bytes]:
        """Pieces of the file in the next bytes of the body."""
        self._pieces = []
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise ApiError(400, "invalid_upload", f"body: a damaged multipart form ({error})") from error
        return self._pieces

    def finish(self) -> None:
        """Check that the form was whole."""
        if not self._ended:
            raise ApiError(400, "invalid_upload", "body: the multipart form is cut short")
        if self._files != 1:
            raise ApiError(400, "invalid_upload", f"body: expected one file, got {self._files}")

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            if b"filename" in options:
                self._files += 1
                self._inside = self._files == 1
                self.name = options[b"filename"].decode("utf-8", "replace")[:_LONGEST_NAME]
        self._field, self._value = b"", b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._inside:
            self._pieces.append(data[start:end])

    def _on_part_end(self) -> None:
        self._inside = False

    def _on_end(self) -> None:
        self._ended = True


def suffix_for(head: bytes) -> str:
    """File suffix by the first bytes of a file; what the client calls it does not matter.

    Raises:
        ApiError: 415 when it is neither NIfTI nor a zip.
    """
    if head.startswith(b"\x1f\x8b"):
        return ".nii.gz"
    if head.startswith(b"PK\x03\x04"):
        return ".zip"
    if any(head[:4] == size.to_bytes(4, order) for size in _NIFTI_SIZES for order in ("little", "big")):
        return ".nii"
    raise ApiError(415, "unsupported_scan", "file: expected NIfTI (.nii, .nii.gz) or a zip with a DICOM series")


def check_promises(path: Path, settings: ServerSettings) -> None:
    """Refuse by its header what would take too much memory or disk to read.

    Raises:
        ApiError: 413 beyond the limits; 400 when the header cannot be read.
    """
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > settings.max_unpacked:
                raise ApiError(
                    413, "too_large", f"file: unpacks to {size} bytes, more than the {settings.max_unpacked} allowed"
                )
            return
        shape = nib.load(path).shape
    except ApiError:
        raise
    except Exception as error:
        # Whatever a damaged header makes the reader do, it is the header's fault.
        raise ApiError(400, "invalid_scan", f"file: its header cannot be read ({type(error).__name__})") from error
    voxels = int(np.prod(shape, dtype=object))
    if voxels > settings.max_voxels:
        raise ApiError(
            413, "too_large", f"file: its header promises {voxels} voxels, more than the {settings.max_voxels} allowed"
        )
