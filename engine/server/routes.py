"""The routes: HTTP in, calls of the engine, HTTP out."""

import time
from dataclasses import dataclass
from threading import Event
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer
from starlette.requests import ClientDisconnect

from medvl_sam2 import __version__
from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.segmentation import Segmentation
from medvl_sam2.engine.server.chat import Chat
from medvl_sam2.engine.server.errors import CLIENT_GONE, ApiError, responses
from medvl_sam2.engine.server.masks import StoredMask, describe
from medvl_sam2.engine.server.metrics import Metrics
from medvl_sam2.engine.server.queue import RequestQueue
from medvl_sam2.engine.server.schemas import (
    ChatCompletion,
    ChatRequest,
    Deleted,
    Health,
    Mask,
    MaskList,
    ModelCard,
    ModelList,
    Report,
    ReportRequest,
    SegmentRequest,
    VolumeInfo,
    VolumeList,
)
from medvl_sam2.engine.server.settings import ServerSettings
from medvl_sam2.engine.server.uploads import Upload
from medvl_sam2.engine.server.volumes import StoredVolume, VolumeStore

_NIFTI = "application/gzip"
_FILE = {"type": "string", "format": "binary"}
_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {"type": "object", "required": ["file"], "properties": {"file": _FILE}}},
            "application/octet-stream": {"schema": _FILE},
        },
    },
}


@dataclass(eq=False)
class Server:
    """Everything that the routes share."""

    engine: MedVLEngine
    model: str
    settings: ServerSettings
    store: VolumeStore
    queue: RequestQueue
    metrics: Metrics
    started: int
    uploads: int = 0


def _server(request: Request) -> Server:
    return request.app.state.server


def _owned(request: Request, volume_id: Annotated[str, Path(max_length=100)]) -> StoredVolume:
    return request.app.state.server.store.get(volume_id, request.state.owner)


Shared = Annotated[Server, Depends(_server)]
Owned = Annotated[StoredVolume, Depends(_owned)]
# The keys are asked for before the routes, by the middleware; this one is for the API's description.
described = Depends(HTTPBearer(auto_error=False, description="API key; none is needed where none is set"))
router = APIRouter(dependencies=[described])
open_router = APIRouter()


@open_router.get("/health", tags=["server"])
async def health(server: Shared) -> Health:
    """Whether the server is up."""
    return Health(version=__version__, model=server.model, device=str(server.engine.device))


@router.get("/metrics", tags=["server"], responses={**responses(), 200: {"content": {"text/plain": {}}}})
async def metrics(server: Shared) -> Response:
    """Counters in Prometheus' text format."""
    server.metrics.volumes.set(len(server.store))
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/v1/models", tags=["chat"], responses=responses())
async def list_models(server: Shared) -> ModelList:
    """The model that is served."""
    return ModelList(data=[ModelCard(id=server.model, created=server.started)])


@router.get("/v1/models/{model_id:path}", tags=["chat"], responses=responses(404))
async def get_model(server: Shared, model_id: str) -> ModelCard:
    """One model."""
    _check_model(server, model_id)
    return ModelCard(id=server.model, created=server.started)


@router.post(
    "/v1/chat/completions",
    tags=["chat"],
    response_model=ChatCompletion,
    responses={**responses(404, 429, 503, 504), 200: {"content": {"text/event-stream": {}}}},
)
async def chat(server: Shared, request: Request, body: ChatRequest) -> Any:
    """Answer about a scan, as OpenAI's chat does, with masks beside the text."""
    _check_model(server, body.model)
    volume = server.store.get(body.volume_id, request.state.owner)
    conversation = Chat(body, volume, server.store, server.metrics)
    if not body.stream:
        return await server.queue.run(request, conversation.whole)
    pieces = await server.queue.stream(request, conversation.pieces)
    return StreamingResponse(
        conversation.events(pieces), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


@router.post(
    "/v1/volumes",
    tags=["volumes"],
    status_code=201,
    responses=responses(409, 415, 429, 503, 504, 507),
    openapi_extra=_UPLOAD_BODY,
)
async def upload_volume(server: Shared, request: Request) -> VolumeInfo:
    """Upload a scan: NIfTI (.nii, .nii.gz) or a zip with a DICOM series, as a form or as the body itself."""
    server.queue.check_room()
    server.store.check_quota(request.state.owner)
    if server.uploads >= server.settings.max_uploads:
        raise ApiError(429, "too_many_uploads", f"{server.uploads} uploads at a time; come again", {"Retry-After": "5"})
    server.uploads += 1
    try:
        volume = await server.store.receive(Upload(request), request.state.owner)
    except ClientDisconnect as error:
        raise ApiError(CLIENT_GONE, "client_gone", "the client has hung up") from error
    finally:
        server.uploads -= 1
    server.metrics.upload_bytes.inc(volume.path.stat().st_size)
    try:
        return await server.queue.run(request, lambda cancel: server.store.admit(volume, cancel))
    except BaseException:
        server.store.delete(volume)
        raise


@router.get("/v1/volumes", tags=["volumes"], responses=responses())
async def list_volumes(server: Shared, request: Request) -> VolumeList:
    """Scans of this key."""
    return VolumeList(data=[server.store.info(volume) for volume in server.store.of(request.state.owner)])


@router.get("/v1/volumes/{volume_id}", tags=["volumes"], responses=responses(404))
async def get_volume(server: Shared, volume: Owned) -> VolumeInfo:
    """One scan."""
    return server.store.info(volume)


@router.delete("/v1/volumes/{volume_id}", tags=["volumes"], responses=responses(404))
def delete_volume(server: Shared, volume: Owned) -> Deleted:
    """Delete a scan and its masks."""
    server.store.delete(volume)
    return Deleted(id=volume.id)


@router.post(
    "/v1/volumes/{volume_id}/segment",
    tags=["volumes"],
    response_model=Mask | MaskList,
    responses={**responses(404, 429, 503, 504), 200: {"content": {_NIFTI: {"schema": _FILE}}}},
)
async def segment(server: Shared, request: Request, volume: Owned, body: SegmentRequest) -> Any:
    """Segment one object by words, points, a box, or all of them; several by words; or refine a mask by more points.

    With format "nifti" the answer is a .nii.gz on the scan's own grid, and its header X-Mask-Id names the mask.
    """
    before = None if body.mask_id is None else StoredMask.load(volume.folder, body.mask_id).asked

    def work(cancel: Event) -> Response | Mask | MaskList:
        with server.store.using(volume) as session:
            if body.targets is not None:
                every = session.segment_all(body.targets, cancel=cancel)
                server.metrics.observe_work(every[0].timings)
                return MaskList(data=[kept(found)[1] for found in every])
            if before is not None:
                space = body.space if "space" in body.model_fields_set else None
                found = session.refine(before, body.points, space=space, cancel=cancel)
            else:
                marks = {"points": body.points or None, "box": body.box, "space": body.space}
                found = session.segment(body.target, **marks, cancel=cancel)
            server.metrics.observe_work(found.timings)
            stored, mask = kept(found)
            return mask if body.format == "rle" else _nifti(stored, stored.nifti(session.volume))

    def kept(found: Segmentation) -> tuple[StoredMask, Mask]:
        stored = StoredMask.of(found)
        server.metrics.masks.inc()
        server.store.keep(volume, stored)
        return stored, describe(stored, found, volume.id)

    return await server.queue.run(request, work)


@router.get(
    "/v1/volumes/{volume_id}/masks/{mask_id}",
    tags=["volumes"],
    response_class=Response,
    responses={**responses(404, 429, 503, 504), 200: {"content": {_NIFTI: {"schema": _FILE}}}},
)
async def get_mask(
    server: Shared, request: Request, volume: Owned, mask_id: Annotated[str, Path(max_length=100)]
) -> Response:
    """A mask as .nii.gz on the scan's own grid."""
    stored = StoredMask.load(volume.folder, mask_id)

    def work(_: Event) -> Response:
        with server.store.using(volume) as session:
            return _nifti(stored, stored.nifti(session.volume))

    return await server.queue.run(request, work)


@router.post("/v1/volumes/{volume_id}/report", tags=["volumes"], responses=responses(404, 429, 503, 504))
async def report(server: Shared, request: Request, volume: Owned, body: ReportRequest | None = None) -> Report:
    """Write a report of a scan."""
    limit = (body or ReportRequest()).max_tokens

    def work(cancel: Event) -> Report:
        with server.store.using(volume) as session:
            answer = session.report(max_tokens=limit, cancel=cancel)
            server.metrics.observe_work(answer.timings)
            server.metrics.tokens.inc(answer.tokens)
            seconds = {name: round(value, 4) for name, value in answer.timings.items()}
            return Report(volume_id=volume.id, text=answer.text, tokens=answer.tokens, seconds=seconds)

    return await server.queue.run(request, work)


def new_server(engine: MedVLEngine, model: str, settings: ServerSettings) -> Server:
    """The shared state of an app.

    Raises:
        InputError: The folder of the scans cannot be written.
    """
    counters = Metrics(engine.device)
    store, queue = VolumeStore(engine, settings), RequestQueue(settings, counters)
    return Server(engine, model, settings, store, queue, counters, int(time.time()))


def _check_model(server: Server, name: str) -> None:
    if name != server.model:
        raise ApiError(404, "model_not_found", f"model: {name!r} is not served; expected {server.model!r}")


def _nifti(stored: StoredMask, content: bytes) -> Response:
    headers = {
        "X-Mask-Id": stored.id,
        "X-Absent": str(stored.absent).lower(),
        "Content-Disposition": f'attachment; filename="{stored.id}.nii.gz"',
    }
    return Response(content, media_type=_NIFTI, headers=headers)
