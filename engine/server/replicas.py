"""Several engines behind one address, by Ray Serve (`pip install medvl-sam2[ray]`).

Every replica is the whole server with an engine of its own; they share the folder of the uploaded scans, so any of them
answers any request, at the price of encoding a scan once per replica that meets it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medvl_sam2.engine.engine import MedVLEngine
from medvl_sam2.engine.geometry import InputError
from medvl_sam2.engine.server.app import create_app
from medvl_sam2.engine.server.auth import ApiKeys, check_host
from medvl_sam2.engine.server.settings import ServerSettings


def serve_replicas(
    name: str,
    *,
    replicas: int,
    host: str,
    port: int,
    data: Path,
    keys: ApiKeys,
    engine: dict[str, Any],
    limits: dict[str, float],
    blocking: bool = True,
) -> None:
    """Serve a model from several processes.

    Args:
        name: Preset or model directory.
        replicas: How many; each takes a GPU where there are any.
        host: Address to listen on; without keys, of loopback only.
        port: Port to listen on.
        data: Folder of the uploaded scans, which every replica must reach.
        keys: Who may use it.
        engine: Arguments of `MedVLEngine.from_pretrained`.
        limits: Of `ServerSettings`, for each replica.
        blocking: Return only when told to stop.

    Raises:
        InputError: Ray is not installed, or a host that others reach and no keys.
    """
    check_host(host, keys)
    try:
        from ray import serve
    except ImportError as error:
        raise InputError(f"serve --ray: needs Ray ({error}); pip install 'medvl-sam2[ray]'") from error
    settings = ServerSettings(data=data.resolve(), **limits)
    gpus = int(torch.cuda.is_available() and engine.get("device") != "cpu")
    deployment = serve.deployment(serve.ingress(_builder(name, settings, keys, engine))()).options(
        name="medvl-sam2",
        num_replicas=replicas,
        ray_actor_options={"num_gpus": gpus},
        # The server's own queue says when it is full; the rest is health checks and downloads.
        max_ongoing_requests=2 * (settings.workers + settings.waiting),
        graceful_shutdown_timeout_s=settings.grace,
    )
    serve.start(http_options={"host": host, "port": port})
    serve.run(deployment.bind(), name="medvl-sam2", blocking=blocking)


def _builder(name: str, settings: ServerSettings, keys: ApiKeys, engine: dict[str, Any]) -> Callable[[], Any]:
    def build() -> Any:
        return create_app(MedVLEngine.from_pretrained(name, **engine), Path(name).name, settings, keys)

    return build
