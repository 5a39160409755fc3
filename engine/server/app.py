"""The application, and the process that serves it."""

import asyncio
import copy
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from medvl_sam2 import __version__
from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.server import errors
from medvl_sam2.engine.server.auth import ApiKeys, Gate, check_host
from medvl_sam2.engine.server.metrics import Observe
from medvl_sam2.engine.server.routes import new_server, open_router, router
from medvl_sam2.engine.server.settings import ServerSettings


def create_app(engine: MedVLEngine, model: str, settings: ServerSettings, keys: ApiKeys | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        engine: Does the work.
        model: Name under which it is served.
        settings: Limits, and the folder of the scans.
        keys: Who may use it; anyone who reaches it when None.

    Raises:
        InputError: The folder of the scans cannot be written.
    """
    server = new_server(engine, model, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep())
        yield
        sweeper.cancel()
        await server.queue.drain()

    async def _sweep() -> None:
        while True:
            await asyncio.sleep(min(60.0, settings.expire / 4))
            await asyncio.to_thread(server.store.expire)

    app = FastAPI(
        title="MedVL-SAM2",
        version=__version__,
        summary="Reports, answers and masks of CT scans. Not a medical device.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.server = server
    app.include_router(open_router)
    app.include_router(router)
    errors.install(app)
    app.add_middleware(Gate, keys=keys or ApiKeys([]), max_body=settings.max_body)
    app.add_middleware(Observe, metrics=server.metrics)
    return app


def serve(
    engine: MedVLEngine,
    model: str,
    *,
    host: str,
    port: int,
    data: Path | None = None,
    keys: ApiKeys | None = None,
    **limits: float,
) -> None:
    """Serve until told to stop (SIGTERM, SIGINT), then let finish what runs.

    Args:
        engine: Does the work.
        model: Name under which it is served.
        host: Address to listen on; without keys, of loopback only.
        port: Port to listen on.
        data: Folder of the uploaded scans, which a restart serves again; a temporary one when None.
        keys: Who may use it.
        **limits: Of `ServerSettings`.

    Raises:
        InputError: A host that others reach and no keys, or a folder that cannot be written.
    """
    keys = keys or ApiKeys([])
    check_host(host, keys)
    with ExitStack() as stack:
        if data is None:
            data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="medvl_sam2_")))
        settings = ServerSettings(data=data, **limits)
        app = create_app(engine, model, settings, keys)
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=_log_config(),
            timeout_graceful_shutdown=int(settings.grace),
            server_header=False,
        )
        # uvicorn sends itself the signal again once all has ended, which must not stop the tidying up here.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            with suppress(KeyboardInterrupt):
                uvicorn.Server(config).run()
        finally:
            signal.signal(signal.SIGTERM, before)


def _log_config() -> dict[str, Any]:
    """uvicorn's own, all of it to stderr: stdout is for the command's result."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config
