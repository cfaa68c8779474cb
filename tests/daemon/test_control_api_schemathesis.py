"""Requests made from the control API's own document, sent through a real gateway to a real daemon, break nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.daemon.conftest import House

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
# Those that end the daemon, go to the network, start engines, or stream until told to stop.
LEFT_OUT = {"post_shutdown", "post_models_pull", "post_replicas", "get_replicas_stats", "get_replicas_name_logs"}


@pytest.mark.filterwarnings("ignore")
def test_requests_made_from_the_document_are_answered_as_it_says(running: House) -> None:
    client = running.client
    key = client.request("POST", "/keys", {"name": "fuzz", "admin": True})["key"]
    address = next(a for a in client.get("/status")["listeners"] if not a.startswith("unix:"))
    loaded = schemathesis.openapi.from_dict(client.request("GET", "/openapi.json"))
    until = time.monotonic() + 25
    asked = 0
    for result in loaded.get_all_operations():
        operation = result.ok()
        if operation.definition.raw["operationId"] in LEFT_OUT:
            continue

        @settings(
            max_examples=8,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def one(case: Any) -> None:
            nonlocal asked
            if time.monotonic() > until or "fuzz" in (case.path_parameters or {}).values():
                return
            asked += 1
            answer = case.call(base_url=f"http://{address}", headers={"Authorization": f"Bearer {key}"}, timeout=15)
            case.validate_response(answer, checks=CHECKS)

        one()
    assert asked > 50
    assert client.get("/status")["models"] >= 0
