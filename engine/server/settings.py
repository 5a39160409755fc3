"""Limits of the server."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What the server takes on.

    Attributes:
        data: Folder of the uploaded scans; those in it from an earlier run are served again.
        workers: Requests that share the engine at a time; each computes in its turn, a token or a mask at a time.
        waiting: Requests that wait for a worker; further ones are told to come again (429).
        timeout: Seconds until a request is given up (504).
        expire: Seconds after its last use until a scan is deleted.
        grace: Seconds that running requests have to finish at shutdown.
        max_upload: Bytes of an uploaded file.
        max_voxels: Voxels of a scan.
        max_unpacked: Bytes of a zip's files together.
        max_volumes: Scans that one key may hold at a time.
        max_uploads: Uploads at a time.
        max_masks: Masks kept per scan for refinement and download; the oldest are dropped.
        max_body: Bytes of a JSON request.
    """

    data: Path
    workers: int = 4
    waiting: int = 32
    timeout: float = 300.0
    expire: float = 3600.0
    grace: float = 60.0
    max_upload: int = 2 << 30
    max_voxels: int = 1 << 29
    max_unpacked: int = 4 << 30
    max_volumes: int = 32
    max_uploads: int = 8
    max_masks: int = 32
    max_body: int = 1 << 20
