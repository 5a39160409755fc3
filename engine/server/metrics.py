"""What the server tells Prometheus."""

import time
from collections.abc import Mapping

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SCAN_STAGES = ("vision", "prefix", "slices")


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        device: Whose memory is shown, where it is a CUDA device.
    """

    def __init__(self, device: torch.device):
        self.registry = CollectorRegistry()
        self.requests = self._add(Counter, "requests_total", "Answers by route and status", ("route", "status"))
        self.seconds = self._add(
            Histogram, "request_seconds", "From the request's head to the answer's end", ("route",), buckets=_SECONDS
        )
        self.stages = self._add(Histogram, "stage_seconds", "Work by stage", ("stage",), buckets=_SECONDS)
        self.queue_seconds = self._add(Histogram, "queue_seconds", "Time in the queue", buckets=_SECONDS)
        self.first_token_seconds = self._add(
            Histogram, "first_token_seconds", "From a chat request to its first token", buckets=_SECONDS
        )
        self.waiting = self._add(Gauge, "queue_waiting", "Requests that wait for a worker")
        self.running = self._add(Gauge, "queue_running", "Requests that share the engine")
        self.rejected = self._add(Counter, "queue_rejected_total", "Requests told to come again")
        self.tokens = self._add(Counter, "tokens_total", "Tokens generated; rate() gives tokens per second")
        self.masks = self._add(Counter, "masks_total", "Masks made")
        self.cache = self._add(
            Counter, "scan_cache_total", "Requests by whether a scan's work was found done", ("found",)
        )
        self.volumes = self._add(Gauge, "volumes", "Scans held")
        self.upload_bytes = self._add(Counter, "upload_bytes_total", "Bytes of scans received")
        if device.type == "cuda":
            memory = self._add(Gauge, "gpu_memory_bytes", "GPU memory of this process", ("kind",))
            memory.labels("allocated").set_function(lambda: torch.cuda.memory_allocated(device))
            memory.labels("reserved").set_function(lambda: torch.cuda.memory_reserved(device))

    def _add(self, kind: type, name: str, text: str, labels: tuple[str, ...] = (), **options: object):
        return kind(f"medvl_sam2_{name}", text, labels, registry=self.registry, **options)

    def observe_work(self, timings: Mapping[str, float]) -> None:
        """Count the stages of one request, and whether it found the scan's own work done."""
        for stage, seconds in timings.items():
            self.stages.labels(stage).observe(seconds)
        self.cache.labels("no" if any(stage in timings for stage in _SCAN_STAGES) else "yes").inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class Observe:
    """Middleware that counts and times requests by route.

    Args:
        app: What lies behind.
        metrics: Told of every answer.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # Of the route, not of the path: made-up paths must not make series.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
