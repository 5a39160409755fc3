"""Unpacks a zip of unknown origin under limits of size, count and place."""

import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medvl_sam2.engine.geometry import InputError

MAX_FILES = 50_000
MAX_BYTES = 16 << 30
MAX_RATIO = 100
_SLACK = 64 << 20


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Unpacks a zip into a temporary folder that is gone when the block ends.

    Raises:
        InputError: damaged or encrypted archives, names that leave the folder, links, zip bombs, no room.
    """
    with tempfile.TemporaryDirectory(prefix="medvl_sam2_") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                _check(members, path)
                for number, member in enumerate(members):
                    _extract(archive, member, Path(folder) / f"{number:06d}")
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise InputError(f"{path}: the zip archive is damaged or encrypted ({error}); pack it again") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be unpacked ({error.strerror}); free space in {folder}") from error
        yield Path(folder)


def _check(members: list[zipfile.ZipInfo], path: Path) -> None:
    size, packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
    if len(members) > MAX_FILES or size > min(MAX_BYTES, MAX_RATIO * packed + _SLACK):
        raise InputError(
            f"{path}: the archive unpacks to {len(members)} files and {size / 1e9:,.1f} GB, beyond the limit; unpack it"
            " yourself and give the folder"
        )
    for member in members:
        name = member.filename.replace("\\", "/")
        if ".." in name.split("/") or name.startswith("/") or stat.S_ISLNK(member.external_attr >> 16):
            raise InputError(f"{path}: the entry {member.filename!r} points outside the archive; pack it again")


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Writes one member under a name of our own; ``zipfile`` reads no more than the size that was checked."""
    with archive.open(member) as inner, target.open("wb") as outer:
        while block := inner.read(1 << 20):
            outer.write(block)
