"""The server against requests made from its own description."""

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from medvl_sam2.engine.server.app import create_app
from medvl_sam2.engine.server.settings import ServerSettings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def served(engine, tmp_path_factory):
    settings = ServerSettings(data=tmp_path_factory.mktemp("schema") / "data")
    return create_app(engine, "small", settings)


@pytest.fixture(scope="module")
def volume(served, scan, upload_to):
    with TestClient(served) as client:
        yield upload_to(client, scan)["id"]


@pytest.fixture(scope="module")
def upload_to():
    def send(client, path):
        with path.open("rb") as stream:
            return client.post("/v1/volumes", files={"file": (path.name, stream)}).json()

    return send


@pytest.fixture(scope="module")
def described(served):
    return schemathesis.openapi.from_asgi("/openapi.json", served)


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_server(case, volume):
    # Made-up ids would never get beyond 404.
    if case.method != "DELETE":
        if "volume_id" in case.path_parameters:
            case.path_parameters["volume_id"] = volume
        if isinstance(case.body, dict) and "volume_id" in case.body:
            case.body |= {"volume_id": volume, "model": "small", "max_tokens": 2}
    answer = case.call()
    case.validate_response(answer, checks=CHECKS)
