"""A folder of scans in, a folder of masks and a JSON line per scan out.

A run that was stopped goes on where it was; a scan that cannot be read or processed gets a line with the reason, and is
tried again by the next run. Several workers run under Ray Data (`pip install medvl-sam2[ray]`).
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medvl_sam2.engine.dicom import is_image
from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.files import make_folder, write_text
from medvl_sam2.engine.formats import ITK_READERS, NIFTI, suffix_of
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.masks import write_mask
from medvl_sam2.engine.segmentation import label_map

logger = logging.getLogger(__name__)
RESULTS, JOB, MASKS = "results.jsonl", "job.json", ".masks.nii.gz"
_SUFFIXES = (*NIFTI, *ITK_READERS, ".zip")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with each scan.

    Attributes:
        model: Preset or model directory.
        device: See `MedVLEngine`.
        dtype: See `MedVLEngine`.
        targets: Names or descriptions of objects to segment, into one label map.
        questions: To answer.
        report: Whether to write a report.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    targets: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    report: bool = False


class Worker:
    """Processes scans, one after another, with an engine of its own.

    Args:
        job: What to do.
        folder: Of the scans.
        out: Folder of the masks.
    """

    def __init__(self, job: Job, folder: Path, out: Path):
        self.job, self.folder, self.out = job, folder, out
        self.engine = MedVLEngine.from_pretrained(job.model, device=job.device, dtype=job.dtype)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Process {"scan": path below the folder}; gives {"line": JSON}. Never raises for a scan's sake."""
        document: dict[str, Any] = {"scan": row["scan"]}
        try:
            document |= {"ok": True, **self._process(row["scan"])}
        except InputError as error:
            document |= {"ok": False, "error": str(error)}
        except Exception as error:
            logger.exception("%s failed", row["scan"])
            document |= {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        return {"line": json.dumps(document)}

    def _process(self, scan: str) -> dict[str, Any]:
        path = self.folder / scan
        session = self.engine.open(path)
        try:
            document: dict[str, Any] = {"warnings": list(session.volume.warnings)}
            if self.job.report:
                document["report"] = session.report().text
            if self.job.questions:
                document["answers"] = [answer.text for answer in session.ask_all(self.job.questions)]
            if self.job.targets:
                document |= self._masks(scan, session.segment_all(self.job.targets))
            return document | {"seconds": {name: round(value, 4) for name, value in session.stages.items()}}
        finally:
            self.engine.close(path)

    def _masks(self, scan: str, found: Sequence[Any]) -> dict[str, Any]:
        labels = {value: one.name for value, one in enumerate(found, 1) if not one.absent}
        mask, volume = label_map(found), found[0].volume
        target = None
        if labels:
            target = self.out / f"{scan}{MASKS}"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_mask(target, mask, volume, labels)
        objects = [
            {
                "name": one.name,
                "label": None if one.absent else value,
                "volume_ml": round(int((mask == value).sum()) * volume.voxel_ml, 2),
                "answer": one.text,
            }
            for value, one in enumerate(found, 1)
        ]
        return {"mask": None if target is None else str(target.relative_to(self.out)), "objects": objects}


def find_scans(folder: Path, out: Path | None = None) -> list[str]:
    """Scans below a folder, by path relative to it, sorted: image files, zips, and folders of DICOM files.

    Args:
        folder: Where to look.
        out: Folder of the results; where it lies below the other, it is passed over. Masks of `batch` are everywhere.
    """
    found = []
    for directory, names, files in os.walk(folder):
        place = Path(directory)
        names[:] = sorted(name for name in names if place / name != out)
        images = [name for name in files if suffix_of(Path(name)) in _SUFFIXES]
        scans = [name for name in images if not name.lower().endswith(MASKS)]
        found += [str((place / name).relative_to(folder)) for name in scans]
        others = sorted(set(files) - set(images))
        if place != folder and any(is_image(place / name) for name in others):
            found.append(str(place.relative_to(folder)))
    return sorted(found)


def run(folder: str | os.PathLike, out: str | os.PathLike, job: Job, *, workers: int = 1) -> dict[str, Any]:
    """Process every scan below a folder.

    Args:
        folder: Of the scans.
        out: Gets `results.jsonl` and the masks; an earlier run of the same job in it is continued.
        job: What to do with each.
        workers: Engines at work at a time; more than one needs Ray.

    Returns:
        Counts: scans, done (in this run), skipped (done before), failed; and problems, each with path and reason.

    Raises:
        InputError: No scans, nothing to do, or another job's results in `out`.
    """
    folder = Path(folder).resolve()
    scans = find_scans(folder, Path(out).resolve()) if folder.is_dir() else []
    if not scans:
        raise InputError(f"{folder}: holds no scans; give a folder with .nii.gz, .nrrd, .mha, .zip or DICOM folders")
    if not (job.targets or job.questions or job.report):
        raise InputError("batch: nothing to do; give --target, --question or --report")
    out = make_folder(out).resolve()
    _check_job(out, job)
    known = _done(out / RESULTS)
    rows = [{"scan": scan} for scan in scans if scan not in known]
    problems = []
    unseen = {row["scan"] for row in rows}
    with (out / RESULTS).open("a", encoding="utf-8") as stream:

        def note(line: str) -> None:
            # One write per line: whatever stops the run leaves whole lines, the last aside.
            stream.write(line + "\n")
            stream.flush()
            document = json.loads(line)
            unseen.discard(document["scan"])
            if not document["ok"]:
                reason = document["error"].removeprefix(f"{folder / document['scan']}: ")
                problems.append({"path": document["scan"], "reason": reason})

        for result in _results(rows, folder, out, job, workers):
            note(result["line"])
        for scan in sorted(unseen):
            note(json.dumps({"scan": scan, "ok": False, "error": "the process that worked on it died"}))
    return {
        "scans": len(scans),
        "done": len(rows) - len(problems),
        "skipped": len(scans) - len(rows),
        "failed": len(problems),
        "results": out / RESULTS,
        "problems": problems,
    }


def _results(rows: list[dict[str, str]], folder: Path, out: Path, job: Job, workers: int) -> Iterable[dict[str, str]]:
    if not rows:
        return ()
    if workers == 1:
        return map(Worker(job, folder, out), rows)
    return _by_ray(rows, folder, out, job, min(workers, len(rows)))


def _by_ray(rows: list[dict[str, str]], folder: Path, out: Path, job: Job, workers: int) -> Iterator[dict[str, str]]:
    try:
        import ray.data
    except ImportError as error:
        raise InputError(f"workers: {workers} need Ray ({error}); pip install 'medvl-sam2[ray]'") from error
    import torch

    context = ray.data.DataContext.get_current()
    # A scan that kills its worker costs that scan alone.
    context.max_errored_blocks = -1
    gpus = int(torch.cuda.is_available() and job.device != "cpu")
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Worker,
        fn_constructor_args=(job, folder, out),
        concurrency=workers,
        num_gpus=gpus or None,
        max_restarts=-1,
        max_task_retries=0,
    )
    yield from data.iter_rows()


def _check_job(out: Path, job: Job) -> None:
    """Results of two jobs in one file could not be told apart."""
    document, path = asdict(job), out / JOB
    document.pop("device")
    text = json.dumps(document, indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{out}: holds the results of another job (see {JOB}); choose another folder")
    write_text(path, text)


def _done(path: Path) -> set[str]:
    """Scans that an earlier run has done; its failures and a line cut short are taken out of the file."""
    if not path.exists():
        return set()
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            document = json.loads(line)
        except ValueError:
            continue
        if document["ok"]:
            lines.append((document["scan"], line))
    write_text(path, "".join(f"{line}\n" for _, line in lines))
    return {scan for scan, _ in lines}
