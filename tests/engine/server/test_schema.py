"""The server against requests made from its own description."""

import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from medvl_sam2.engine.language.base import Step
from medvl_sam2.engine.server.app import create_app
from medvl_sam2.engine.server.settings import ServerSettings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


LIMITS = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_no_request_breaks_the_server(engine, scan, upload, tmp_path, monkeypatch):
    token = engine.chat.answer("the")[0]
    # Long answers add time and nothing else.
    monkeypatch.setattr(engine.language, "generate_all", lambda *_, **__: (steps for steps in [[Step(token)]]))
    app = create_app(engine, "small", ServerSettings(data=tmp_path / "data"))
    with TestClient(app) as client:
        volume = upload(client, scan)["id"]
        operations = [found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
        assert {operation.path for operation in operations} == set(client.get("/openapi.json").json()["paths"])
        for operation in operations:

            @given(case=operation.as_strategy())
            @LIMITS
            def check(case):
                # Made-up ids would never get beyond 404.
                if case.method != "DELETE":
                    if "volume_id" in case.path_parameters:
                        case.path_parameters["volume_id"] = volume
                    if isinstance(case.body, dict) and "volume_id" in case.body:
                        case.body |= {"volume_id": volume, "model": "small", "max_tokens": 2}
                case.validate_response(case.call(timeout=120), checks=CHECKS)

            check()
        assert client.get(f"/v1/volumes/{volume}").status_code == 200
