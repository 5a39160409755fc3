"""Masks as users get them (run lengths, bounding box, NIfTI), and as the server keeps them."""

import json
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from medvl_sam2.engine.files import replacing
from medvl_sam2.engine.geometry import InputError, Volume
from medvl_sam2.engine.masks import write_mask
from medvl_sam2.engine.segmentation import Asked, Segmentation
from medvl_sam2.engine.server.errors import ApiError, disk_full
from medvl_sam2.engine.server.schemas import Mask, Rle

_ID = re.compile(r"mask_[0-9a-f]{16}")


@dataclass(frozen=True, eq=False)
class StoredMask:
    """A mask with what it was asked for by, so that it can be refined and downloaded.

    Attributes:
        name: Of the object.
        asked: The request and its refinements; its id is the one under which users know the mask.
        counts: Run lengths of the canonical mask, (Z, Y, X) in C order.
        absent: The model answered that there is no such thing.
    """

    name: str
    asked: Asked
    counts: np.ndarray
    absent: bool

    @property
    def id(self) -> str:
        """Under which users know it."""
        return self.asked.id

    @classmethod
    def of(cls, found: Segmentation) -> "StoredMask":
        """What is kept of a segmentation."""
        return cls(found.name, found.asked, run_lengths(found.mask.ravel()), found.absent)

    def save(self, folder: Path) -> None:
        """Write it beside its scan.

        Raises:
            ApiError: 507 when the disk is full.
        """
        about = {"name": self.name, "absent": self.absent, **asdict(self.asked)}
        try:
            with replacing(folder / f"{self.id}.npz") as part, part.open("wb") as stream:
                np.savez(stream, counts=self.counts, about=np.array(json.dumps(about)))
        except InputError as error:
            # A scan that has been deleted meanwhile keeps no masks.
            if folder.is_dir():
                raise disk_full(error) from error

    @classmethod
    def load(cls, folder: Path, identity: str) -> "StoredMask":
        """Read a mask of a scan.

        Raises:
            ApiError: 404 when there is none.
        """
        path = folder / f"{identity}.npz"
        if not _ID.fullmatch(identity) or not path.is_file():
            raise ApiError(404, "mask_not_found", f"mask {identity!r}: no such mask of this scan; segment again")
        with np.load(path) as content:
            about = json.loads(str(content["about"]))
            counts = content["counts"]
        points, box = tuple(map(tuple, about["points"])), about["box"]
        asked = Asked(about["target"], points, box and tuple(box), about["space"], identity)
        return cls(about["name"], asked, counts, about["absent"])

    def nifti(self, volume: Volume) -> bytes:
        """The mask as a .nii.gz on the grid of the scan's own file.

        Raises:
            ApiError: 507 when the disk is full.
        """
        bits = np.arange(len(self.counts), dtype=np.uint8) & 1
        mask = np.repeat(bits, self.counts).reshape(volume.shape)
        with tempfile.TemporaryDirectory(prefix="medvl_sam2_") as folder:
            path = Path(folder) / "mask.nii.gz"
            try:
                write_mask(path, mask, volume, {1: self.name})
            except InputError as error:
                raise disk_full(error) from error
            return path.read_bytes()


def run_lengths(flat: np.ndarray) -> np.ndarray:
    """Lengths of the runs of a bool array, (N,) -> (R,) uint32, beginning with the zeros."""
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(edges, prepend=0, append=flat.size).astype(np.uint32)
    return np.concatenate([np.zeros(1, np.uint32), counts]) if flat[0] else counts


def describe(stored: StoredMask, found: Segmentation, volume_id: str) -> Mask:
    """A segmentation in the file's own index order."""
    own = found.volume.to_source(found.mask)
    box = None
    if own.any():
        spans = [np.flatnonzero(own.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
        box = [int(span[0]) for span in spans] + [int(span[-1]) for span in spans]
    counts = run_lengths(own.ravel(order="F"))
    return Mask(
        id=stored.id,
        volume_id=volume_id,
        name=found.name,
        absent=found.absent,
        text=found.text,
        volume_ml=round(found.volume_ml, 4),
        box=box,
        rle=Rle(shape=list(own.shape), counts=counts.tolist()),
    )
