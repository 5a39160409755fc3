"""The scans that users have uploaded: on disk under names of our own, each its owner's, gone when not used."""

import json
import logging
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.files import make_folder, write_text
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.server.errors import ApiError, disk_full
from medvl_sam2.engine.server.masks import StoredMask
from medvl_sam2.engine.server.queue import Cancelled
from medvl_sam2.engine.server.schemas import VolumeInfo
from medvl_sam2.engine.server.settings import ServerSettings
from medvl_sam2.engine.server.uploads import Upload, check_promises, suffix_for
from medvl_sam2.engine.session import VolumeSession

logger = logging.getLogger(__name__)
_RECORD = "volume.json"
_HEAD = 8
_BLOCK = 1 << 20


@dataclass(eq=False)
class StoredVolume:
    """A scan on disk.

    Attributes:
        id: Under which users know it.
        owner: Digest of the key it was uploaded with.
        name: What its owner calls it; never a path.
        path: The file.
        created: Unix time.
        about: Shape, spacing and warnings, for its owner.
        used: Unix time of the last use.
        users: Requests at work on it.
        masks: Masks made of it, the oldest first.
    """

    id: str
    owner: str
    name: str
    path: Path
    created: float
    about: dict[str, Any] = field(default_factory=dict)
    used: float = field(default_factory=time.time)
    users: int = 0
    masks: "OrderedDict[str, StoredMask]" = field(default_factory=OrderedDict)


class VolumeStore:
    """All uploaded scans.

    Args:
        engine: Reads them.
        settings: Limits, and the folder. Scans in it from an earlier run are taken over, halves of uploads removed.

    Raises:
        InputError: The folder cannot be written.
    """

    def __init__(self, engine: MedVLEngine, settings: ServerSettings):
        self._engine, self._settings = engine, settings
        self._folder = make_folder(settings.data)
        # Scans are patients' data.
        self._folder.chmod(0o700)
        self._lock = threading.Lock()
        self._volumes: dict[str, StoredVolume] = {}
        for folder in sorted(self._folder.glob("vol_*")):
            self._restore(folder)

    def __len__(self) -> int:
        return len(self._volumes)

    def info(self, volume: StoredVolume) -> VolumeInfo:
        """What its owner is told of a scan."""
        return VolumeInfo(
            id=volume.id,
            name=volume.name,
            bytes=volume.path.stat().st_size,
            created=int(volume.created),
            expires=int(volume.used + self._settings.expire),
            **volume.about,
        )

    def of(self, owner: str) -> list[StoredVolume]:
        """Scans of an owner, the oldest first."""
        return sorted((v for v in list(self._volumes.values()) if v.owner == owner), key=lambda v: v.created)

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
            size = await self._write(part, upload.chunks())
            if size == 0:
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
            ApiError: 4xx with what is wrong with it.
            Cancelled: Nobody waits for it any more.
        """
        try:
            check_promises(volume.path, self._settings)
            session = self._open(volume)
            scan = session.volume
            volume.about = {
                "shape": [int(n) for n in scan.source.shape[:3]],
                "spacing_mm": [round(float(s), 5) for s in (scan.source.affine[:3, :3] ** 2).sum(0) ** 0.5],
                "warnings": list(scan.warnings),
            }
            if scan.voxels.size > self._settings.max_voxels:
                raise ApiError(413, "too_large", f"file: expected at most {self._settings.max_voxels} voxels")
            record = {"owner": volume.owner, "name": volume.name, "file": volume.path.name, "about": volume.about}
            try:
                write_text(volume.path.parent / _RECORD, json.dumps(record))
            except InputError as error:
                raise disk_full(error) from error
            with self._lock:
                if cancel.is_set():
                    raise Cancelled
                self.check_quota(volume.owner)
                self._volumes[volume.id] = volume
            return self.info(volume)
        except BaseException:
            self._engine.close(volume.path)
            shutil.rmtree(volume.path.parent, ignore_errors=True)
            raise

    def get(self, identity: str, owner: str) -> StoredVolume:
        """A scan of an owner.

        Raises:
            ApiError: 404 when there is none, or it is another's: nobody learns which.
        """
        volume = self._volumes.get(identity)
        if volume is None or volume.owner != owner:
            raise ApiError(404, "volume_not_found", f"volume {identity!r}: no such scan; upload it first")
        return volume

    @contextmanager
    def using(self, volume: StoredVolume) -> Iterator[VolumeSession]:
        """The session of a scan, which stays while the block runs.

        Raises:
            ApiError: 404 when it has been deleted in the meantime.
        """
        with self._lock:
            self.get(volume.id, volume.owner)
            volume.users += 1
            volume.used = time.time()
        try:
            yield self._open(volume)
        finally:
            with self._lock:
                volume.users -= 1
                volume.used = time.time()

    def keep(self, volume: StoredVolume, mask: StoredMask) -> None:
        """Keep a mask for refinement and download."""
        with self._lock:
            volume.masks[mask.id] = mask
            while len(volume.masks) > self._settings.max_masks:
                volume.masks.popitem(last=False)

    def delete(self, volume: StoredVolume) -> None:
        """Delete a scan; requests at work on it still end well."""
        with self._lock:
            self._volumes.pop(volume.id, None)
        self._engine.close(volume.path)
        shutil.rmtree(volume.path.parent, ignore_errors=True)

    def expire(self) -> None:
        """Delete what nobody has used for long."""
        end = time.time() - self._settings.expire
        for volume in list(self._volumes.values()):
            if volume.users == 0 and volume.used < end:
                logger.info("volume %s has expired", volume.id)
                self.delete(volume)

    def _open(self, volume: StoredVolume) -> VolumeSession:
        try:
            return self._engine.open(volume.path)
        except InputError as error:
            # The path says where the server keeps its files, and nothing to the user.
            message = str(error).replace(str(volume.path), "file").replace(str(volume.path.parent), "file")
            raise ApiError(400, "invalid_scan", message) from error

    def _restore(self, folder: Path) -> None:
        try:
            record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            path = folder / record["file"]
            created = path.stat().st_mtime
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder, ignore_errors=True)
            return
        volume = StoredVolume(folder.name, record["owner"], record["name"], path, created, record["about"])
        self._volumes[volume.id] = volume


def _write_all(stream: Any, block: bytes) -> None:
    """Write to an unbuffered file, which may take less than it is given at a time."""
    view = memoryview(block)
    while view:
        view = view[stream.write(view) :]
