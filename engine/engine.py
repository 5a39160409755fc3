"""The runtime: a model on its device, and the sessions of the scans it knows."""

import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from medvl_sam2.engine.beside import Beside
from medvl_sam2.engine.float8 import Float8Check, use_float8
from medvl_sam2.engine.geometry import InputError, Volume
from medvl_sam2.engine.language.base import LanguageBackend
from medvl_sam2.engine.language.transformers import TransformersBackend
from medvl_sam2.engine.precision import choose_device, choose_precision
from medvl_sam2.engine.segmenter import Segmenter
from medvl_sam2.engine.session import VolumeSession
from medvl_sam2.engine.turns import FairLock
from medvl_sam2.engine.volumes import read_volume
from medvl_sam2.kernels.float8_linear import why_not_float8
from medvl_sam2.model.export import EXPORTED, check_export, export_language
from medvl_sam2.model.modeling import MedVLSAM2, cast_weights, model_directory
from medvl_sam2.model.processing import VolumeProcessor

LANGUAGE_BACKENDS = ("transformers", "vllm")


class MedVLEngine:
    """Reports, answers and masks of CT scans from one model.

    Safe from several threads: one request computes at a time.

    Args:
        model: In evaluation mode; the engine takes it over (casts it, merges its LoRA).
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "auto", "float32", "bfloat16" or "float16", see `choose_precision`.
        language_backend: Runtime of the LLM, one of `LANGUAGE_BACKENDS`.
        cache_bytes: Most memory that scans and what is computed of them may hold; the least recently used are let go.
        exported: The LLM as `medvl-sam2 convert --for vllm` writes it, for vLLM; made for this run when None.

    Raises:
        InputError: An unknown device, dtype or backend, or `exported` is of other weights.
    """

    def __init__(
        self,
        model: MedVLSAM2,
        *,
        device: str = "auto",
        dtype: str = "auto",
        language_backend: str = "transformers",
        cache_bytes: int = 2 << 30,
        exported: Path | None = None,
    ):
        if language_backend not in LANGUAGE_BACKENDS:
            known = ", ".join(LANGUAGE_BACKENDS)
            raise InputError(f"language_backend: expected one of {known}, got {language_backend!r}")
        try:
            self.device = choose_device(device)
            self.precision = choose_precision(dtype, self.device, model.config)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.config = model.config
        self.cache_bytes = cache_bytes
        self.lock = FairLock()
        self.processor = VolumeProcessor(model.config)
        self.tokenizer = model.tokenizer
        self.chat = model.chat
        self._model = model.eval().requires_grad_(False)
        limit = model.language.causal.config.max_position_embeddings
        self.room = limit - len(self.chat.prefix())
        self.language = self._language(model, language_backend, exported)
        for module in (model.vision, model.projector):
            cast_weights(module.to(self.device), self.precision.vision)
        for module in (model.seg_bridge, model.sam2):
            cast_weights(module.to(self.device), self.precision.sam2)
        self.segmenter = Segmenter(model.sam2, model.config.seg)
        self.beside = Beside.of(self.device)
        self._sessions: dict[Hashable, VolumeSession] = {}
        # Every session that someone holds, opened from a file or not, the one used last at the end.
        self._used: WeakKeyDictionary[VolumeSession, None] = WeakKeyDictionary()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        device: str = "auto",
        dtype: str = "auto",
        language_backend: str = "transformers",
        cache_bytes: int = 2 << 30,
    ) -> "MedVLEngine":
        """Load a preset with shipped weights ("tiny") or a model directory.

        Args:
            name: Preset or directory.
            device: See `MedVLEngine`.
            dtype: See `MedVLEngine`.
            language_backend: See `MedVLEngine`.
            cache_bytes: See `MedVLEngine`.

        Raises:
            InputError: No such model, or its files are damaged or do not fit together; the LLM exported for vLLM too.
        """
        try:
            model = MedVLSAM2.from_pretrained(name)
        except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
            message = " ".join(str(error).split())
            prefix = "" if str(name) in message else f"model {str(name)!r}: "
            raise InputError(f"{prefix}{message}") from error
        exported = model_directory(name) / EXPORTED
        return cls(
            model,
            device=device,
            dtype=dtype,
            language_backend=language_backend,
            cache_bytes=cache_bytes,
            exported=exported if exported.is_dir() else None,
        )

    def open(self, scan: str | os.PathLike | Volume | np.ndarray, *, series: str | None = None) -> VolumeSession:
        """Open a scan; one that is open already comes back with its work done.

        Args:
            scan: File or DICOM folder, a `Volume`, or a (Z, Y, X) array in HU in LPS order with 1 mm voxels.
            series: Which DICOM series, where there are several.

        Raises:
            InputError: The scan cannot be read.
        """
        if isinstance(scan, np.ndarray):
            scan = Volume.from_array(scan)
        if isinstance(scan, Volume):
            return VolumeSession(self, scan)
        key = (_fingerprint(Path(scan)), series)
        with self.lock:
            known = self._sessions.get(key)
        # Read without the lock: a large scan takes seconds, in which others compute.
        session = known or VolumeSession(self, read_volume(scan, series=series))
        with self.lock:
            session = self._sessions.setdefault(key, session)
            self._trim(session)
            return session

    def close(self, scan: str | os.PathLike) -> None:
        """Forget the scan of a file or folder, and free what is kept of it."""
        name = str(Path(scan).resolve())
        with self.lock:
            for key, session in list(self._sessions.items()):
                if key[0][0] == name:
                    del self._sessions[key]
                    self._used.pop(session, None)
                    session.release()

    def use_float8(
        self,
        scan: str | os.PathLike | Volume,
        targets: Sequence[str],
        *,
        least_dice: float = 0.99,
        least_tokens: float = 0.95,
    ) -> Float8Check:
        """Round the weights of the LLM's and the image encoder's widest layers to float8, if a scan shows no harm.

        The scan's masks and report are made before and after; where they differ by more than the bounds, the weights
        stay as they were. To be called before other threads use the engine: it lets go of all that is kept of scans.

        Args:
            scan: One of the kind that will be read.
            targets: Names of objects in it.
            least_dice: Least overlap of each mask with the one before.
            least_tokens: Least share of the report's tokens that the model would still say next.

        Raises:
            InputError: The device has no float8 products, another backend than transformers runs the LLM, or the model
                finds none of the targets.
        """
        if reason := why_not_float8(self.device):
            raise InputError(f"float8: {reason}; leave the weights as they are")
        if not isinstance(self.language, TransformersBackend):
            raise InputError("float8: expected the transformers backend; vLLM rounds its weights itself (quantization)")
        volume = scan if isinstance(scan, Volume) else read_volume(scan)
        return use_float8(self, self._model, volume, targets, least_dice=least_dice, least_tokens=least_tokens)

    def forget(self) -> None:
        """Let go of all that is kept of scans, and of what was recorded with the weights as they are."""
        with self.lock:
            for session in list(self._used):
                session.release()
            if isinstance(self.language, TransformersBackend):
                self.language.forget()

    @contextmanager
    def using(self, session: VolumeSession) -> Iterator[None]:
        """Hold the engine for a request of a session, then bring the cache back to its bound."""
        with self.lock:
            try:
                yield
            finally:
                self._trim(session)

    def visual_tokens(self, grid: Tensor) -> Tensor:
        """(1, D, H, W) encoder grid -> (tokens, H) rows for the LLM."""
        with torch.inference_mode():
            return self._model.visual_tokens(grid[None].to(self.device, self.precision.vision))[0]

    def embeddings(self, hidden: Tensor) -> Tensor:
        """(..., E, H) [SEG] states -> (..., E, d) prompt tokens of SAM2."""
        with torch.inference_mode():
            rows = hidden.reshape(-1, hidden.shape[-1]).to(self.device, self.precision.sam2)
            return self._model.seg_bridge(rows).reshape(*hidden.shape[:-1], -1)

    def _language(self, model: MedVLSAM2, name: str, exported: Path | None) -> LanguageBackend:
        """Hand the LLM to its runtime."""
        convention = model.config.seg.convention
        if name == "transformers":
            # LoRA is merged in the wider type of the files' and the run's, so that the sum is rounded once at most.
            if self.precision.language == torch.float32:
                cast_weights(model.language, self.precision.language)
            backend = TransformersBackend(model.language, self.chat, convention)
            cast_weights(model.language.to(self.device), self.precision.language)
            return backend
        if exported is not None:
            try:
                check_export(exported, model.language)
            except ValueError as error:
                raise InputError(str(error)) from error
        from medvl_sam2.engine.language.vllm_backend import VLLMBackend

        with TemporaryDirectory(prefix="medvl_sam2_") as folder:
            directory = exported or export_language(model.language, folder, merge=True)
            # vLLM holds the weights from here on.
            model.language = None
            return VLLMBackend(directory, self.chat, convention, device=self.device, dtype=self.precision.language)

    def _trim(self, current: VolumeSession) -> None:
        """Note the use of a session, and let the least recently used ones go until the rest is within the bound."""
        self._used.pop(current, None)
        self._used[current] = None
        names = {id(session): key for key, session in self._sessions.items()}
        sessions = list(self._used)
        # The voxels of a scan that the cache does not know are their owner's.
        sizes = [s.nbytes + (s.volume.voxels.nbytes if id(s) in names else 0) for s in sessions]
        held = sum(sizes)
        for session, size in zip(sessions, sizes):
            if held <= self.cache_bytes:
                return
            if session is not current and size:
                held -= size
                session.release()
                self._sessions.pop(names.get(id(session)), None)


def _fingerprint(path: Path) -> Hashable:
    """Changes when the file, or a file of the folder, changes."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in files if file.is_file()]
    return (str(path.resolve()), *((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats))
