"""The scans that users have uploaded: on disk under names of our own, each its owner's, gone when not used.

The disk is the only record, so a restarted server, and every one of several that share a folder, knows the same scans.
"""

import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from medvl_sam2.engine.cancelling import check
from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.files import make_folder, write_text
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.server.errors import ApiError, disk_full
from medvl_sam2.engine.server.masks import StoredMask
from medvl_sam2.engine.server.schemas import VolumeInfo
from medvl_sam2.engine.server.settings import ServerSettings
from medvl_sam2.engine.server.uploads import Upload, check_promises, suffix_for
from medvl_sam2.engine.session import VolumeSession

logger = logging.getLogger(__name__)
_RECORD = "volume.json"
_ID = re.compile(r"vol_[0-9a-f]{24}")
_HEAD = 8
_BLOCK = 1 << 20


@dataclass(frozen=True)
class StoredVolume:
    """A scan on disk.

    Attributes:
        id: Under which users know it.
        owner: Digest of the key it was uploaded with.
        name: What its owner calls it; never a path.
        path: The file.
        created: Unix time.
        about: Shape, spacing and warnings, for its owner.
    """

    id: str
    owner: str
    name: str
    path: Path
    created: float
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Holds the file, the record and the masks."""
        return self.path.parent


class VolumeStore:
    """All uploaded scans.

    Args:
        engine: Reads them.
        settings: Limits, and the folder.

    Raises:
        InputError: The folder cannot be written.
    """

    def __init__(self, engine: MedVLEngine, settings: ServerSettings):
        self._engine, self._settings = engine, settings
        self._folder = make_folder(settings.data)
        # Scans are patients' data.
        self._folder.chmod(0o700)
        self._lock = threading.Lock()
        self._users: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(1 for _ in self._folder.glob(f"vol_*/{_RECORD}"))

    def info(self, volume: StoredVolume) -> VolumeInfo:
        """What its owner is told of a scan.

        Raises:
            ApiError: 404 when it has been deleted in the meantime.
        """
        try:
            used, size = (volume.folder / _RECORD).stat().st_mtime, volume.path.stat().st_size
        except FileNotFoundError as error:
            raise _missing(volume.id) from error
        expires = int(used + self._settings.expire)
        return VolumeInfo(
            id=volume.id, name=volume.name, bytes=size, created=int(volume.created), expires=expires, **volume.about
        )

    def of(self, owner: str) -> list[StoredVolume]:
        """Scans of an owner, the oldest first."""
        every = (self._load(folder.name) for folder in self._folder.glob("vol_*"))
        return sorted((v for v in every if v is not None and v.owner == owner), key=lambda v: (v.created, v.id))

    def get(self, identity: str, owner: str) -> StoredVolume:
        """A scan of an owner.

        Raises:
            ApiError: 404 when there is none, or it is another's: nobody learns which.
        """
        volume = self._load(identity) if _ID.fullmatch(identity) else None
        if volume is None or volume.owner != owner:
            raise _missing(identity)
        return volume

    def check_quota(self, owner: str) -> None:
        """Find out whether an owner may hold another scan.

        Raises:
            ApiError: 409 when not.
        """
        if len(self.of(owner)) >= self._settings.max_volumes:
            raise ApiError(
                409, "too_many_volumes", f"this key holds {self._settings.max_volumes} scans; delete one first"
            )

    async def receive(self, upload: Upload, owner: str) -> StoredVolume:
        """Write an upload to disk as it comes. It is not served before `admit`.

        Raises:
            ApiError: 413 when too large, 415 when neither NIfTI nor zip, 507 when the disk is full.
        """
        identity = f"vol_{secrets.token_hex(12)}"
        folder = self._folder / identity
        try:
            folder.mkdir()
            part = folder / "scan"
            if not await self._write(part, upload.chunks()):
                raise ApiError(400, "invalid_upload", "file: it is empty")
            with part.open("rb") as stream:
                path = part.with_name(f"scan{suffix_for(stream.read(_HEAD))}")
            part.rename(path)
            return StoredVolume(identity, owner, upload.name, path, time.time())
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and error.errno is not None:
                raise disk_full(error) from error
            raise

    async def _write(self, path: Path, chunks: AsyncIterator[bytes]) -> int:
        size, block = 0, bytearray()
        # Unbuffered, so that closing has nothing left to write and cannot fail.
        with path.open("wb", buffering=0) as stream:
            async for chunk in chunks:
                size += len(chunk)
                if size > self._settings.max_upload:
                    raise ApiError(413, "too_large", f"file: expected at most {self._settings.max_upload} bytes")
                block += chunk
                if len(block) >= _BLOCK:
                    await run_in_threadpool(_write_all, stream, bytes(block))
                    block.clear()
            _write_all(stream, bytes(block))
        return size

    def admit(self, volume: StoredVolume, cancel: threading.Event) -> VolumeInfo:
        """Read an upload whole and, if it is a usable scan, serve it; else delete it.

        Raises:
            ApiError: 4xx with what is wrong with it, 507 when the disk is full.
            Cancelled: Nobody waits for it any more.
        """
        try:
            check_promises(volume.path, self._settings)
            scan = self._open(volume).volume
            if scan.voxels.size > self._settings.max_voxels:
                raise ApiError(413, "too_large", f"file: expected at most {self._settings.max_voxels} voxels")
            volume.about.update(
                shape=[int(n) for n in scan.source.shape[:3]],
                spacing_mm=[round(float(s), 5) for s in (scan.source.affine[:3, :3] ** 2).sum(0) ** 0.5],
                warnings=list(scan.warnings),
            )
            with self._lock:
                check(cancel)
                self.check_quota(volume.owner)
                self._record(volume)
            return self.info(volume)
        except BaseException:
            self.delete(volume)
            raise

    @contextmanager
    def using(self, volume: StoredVolume) -> Iterator[VolumeSession]:
        """The session of a scan, which does not expire while the block runs.

        Raises:
            ApiError: 404 when it has been deleted in the meantime.
        """
        with self._lock:
            self._users[volume.id] += 1
        try:
            self.get(volume.id, volume.owner)
            _touch(volume)
            yield self._open(volume)
        finally:
            with self._lock:
                self._users[volume.id] -= 1
                if not self._users[volume.id]:
                    del self._users[volume.id]
            _touch(volume)

    def keep(self, volume: StoredVolume, mask: StoredMask) -> None:
        """Keep a mask for refinement and download, and drop the oldest beyond the limit.

        Raises:
            ApiError: 507 when the disk is full.
        """
        mask.save(volume.folder)
        with suppress(FileNotFoundError):
            files = sorted(volume.folder.glob("mask_*"), key=lambda file: file.stat().st_mtime_ns)
            for file in files[: -self._settings.max_masks]:
                file.unlink(missing_ok=True)

    def delete(self, volume: StoredVolume) -> None:
        """Delete a scan; requests at work on it still end well."""
        # The record goes first: what is left of an interrupted deletion is served no more, and swept later.
        (volume.folder / _RECORD).unlink(missing_ok=True)
        self._engine.close(volume.path)
        shutil.rmtree(volume.folder, ignore_errors=True)

    def expire(self) -> None:
        """Delete what nobody has used for long, and what is left of uploads that broke off."""
        end = time.time() - self._settings.expire
        for folder in self._folder.glob("vol_*"):
            volume = self._load(folder.name)
            with suppress(FileNotFoundError):
                if volume is None:
                    if folder.stat().st_mtime < end:
                        shutil.rmtree(folder, ignore_errors=True)
                elif not self._users[volume.id] and (folder / _RECORD).stat().st_mtime < end:
                    logger.info("volume %s has expired", volume.id)
                    self.delete(volume)

    def _open(self, volume: StoredVolume) -> VolumeSession:
        try:
            return self._engine.open(volume.path)
        except InputError as error:
            # The path says where the server keeps its files, and nothing to the user.
            message = str(error).replace(str(volume.path), "file").replace(str(volume.folder), "file")
            raise ApiError(400, "invalid_scan", message) from error

    def _record(self, volume: StoredVolume) -> None:
        document = {
            "owner": volume.owner,
            "name": volume.name,
            "file": volume.path.name,
            "created": volume.created,
            "about": volume.about,
        }
        try:
            write_text(volume.folder / _RECORD, json.dumps(document))
        except InputError as error:
            raise disk_full(error) from error

    def _load(self, identity: str) -> StoredVolume | None:
        folder = self._folder / identity
        try:
            record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        path = folder / record["file"]
        return StoredVolume(identity, record["owner"], record["name"], path, record["created"], record["about"])


def _missing(identity: str) -> ApiError:
    return ApiError(404, "volume_not_found", f"volume {identity!r}: no such scan; upload it first")


def _touch(volume: StoredVolume) -> None:
    """Note the use of a scan where every server that shares the folder sees it."""
    with suppress(FileNotFoundError):
        os.utime(volume.folder / _RECORD)


def _write_all(stream: Any, block: bytes) -> None:
    """Write to an unbuffered file, which may take less than it is given at a time."""
    view = memoryview(block)
    while view:
        view = view[stream.write(view) :]
