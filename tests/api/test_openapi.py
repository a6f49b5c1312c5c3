"""/openapi.json and /docs, and what no route tells."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast, get_type_hints

import jsonschema
import pytest
from starlette.testclient import TestClient

from api.app import create_app
from api.protocol import NEUTRAL_VALUES, ChatCompletionRequest, CompletionRequest
from api.routing import EndpointRoute
from engine.core.outputs import CompletionOutput
from engine.core.sampling_params import SAMPLING_PARAMETERS
from tests.helpers.scripted import ScriptedEngine

SECRET = "a secret of /home/me/model"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/embeddings": {"input": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": {"messages": [{"role": "user", "content": "a"}]},
}


async def silent(prompt: list[int], params: object) -> Any:
    yield CompletionOutput(0, "a", [97], finish_reason="stop")


def app_of(engine: object, **options: Any) -> Any:
    return create_app(cast(Any, engine), served_model_names=["scripted"], **options)


def routes_of(app: Any) -> list[EndpointRoute]:
    return [route for route in app.routes if isinstance(route, EndpointRoute)]


@pytest.fixture(scope="module")
def app() -> Any:
    return app_of(ScriptedEngine(silent), api_key="key")


@pytest.fixture(scope="module")
def document(app: Any) -> dict[str, Any]:
    answer = TestClient(app).get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    said: dict[str, Any] = answer.json()
    return said


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    for one in value if isinstance(value, list) else ():
        yield from references(one)


def test_every_route_is_described(app: Any, document: dict[str, Any]) -> None:
    assert len(app.routes) == len(routes_of(app))
    described = {(path, method.upper()) for path, said in document["paths"].items() for method in said}
    assert described == {
        (route.path.replace(":path", ""), method) for route in routes_of(app) for method in route.methods
    }
    names = [said["operationId"] for path in document["paths"].values() for said in path.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_stream_is_described(path: str, document: dict[str, Any]) -> None:
    assert "text/event-stream" in document["paths"][path]["post"]["responses"]["200"]["content"]


def test_every_reference_leads_to_a_schema(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    found = set(references(document))
    assert found
    assert found <= {f"#/components/schemas/{name}" for name in schemas}


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
def test_every_field_has_its_type_and_range(document: dict[str, Any], kind: type) -> None:
    properties = document["components"]["schemas"][kind.__name__]["properties"]
    assert set(properties) == set(kind.__struct_fields__)
    for name, values in NEUTRAL_VALUES.items():
        assert name not in properties or properties[name]["enum"] == [*values, None]
    for name, hint in get_type_hints(kind).items():
        assert hint is Any or properties[name].keys() & {"anyOf", "type", "enum"}, name
    limits = {one.name: one.limits for one in SAMPLING_PARAMETERS if one.limits is not None}
    for name, bounds in limits.items():
        kinds = {one["type"]: one for one in properties[name].get("anyOf", ())}
        number = kinds.get("integer") or kinds.get("number")
        if number is not None and name != "top_k":
            assert number["minimum"] == bounds.low
            assert bounds.high is None or number["maximum"] == bounds.high


@pytest.mark.parametrize("open_metrics", [False, True])
def test_paths_without_a_key_are_the_open_ones(open_metrics: bool) -> None:
    app = app_of(ScriptedEngine(silent), api_key="key", open_metrics=open_metrics)
    document = TestClient(app).get("/openapi.json").json()
    open_paths = {"/health", "/ready", "/ping", "/openapi.json", "/docs"}
    if open_metrics:
        open_paths |= {"/metrics", "/version"}
    keyless = {
        path
        for path, said in document["paths"].items()
        if any("security" not in one for one in said.values())
    }
    assert keyless == open_paths
    client = TestClient(app)
    for route in routes_of(app):
        path = route.path.replace("{name:path}", "scripted")
        for method in route.methods:
            status = client.request(method, path, json=BODIES.get(path)).status_code
            assert status == (200 if path in open_paths else 401)
            answer = client.request(method, path, json=BODIES.get(path), headers={"x-api-key": "key"})
            # There is no response of such an id.
            assert answer.status_code == (404 if "{" in path else 200), answer.text
    # What is no route tells nobody so.
    for path in (
        "/",
        "/v2",
        "/health/",
        "/docs/x",
        "/HEALTH",
        "//health",
        "/metrics/",
    ):
        assert client.get(path).status_code == 401, path


def test_the_page_needs_no_network(app: Any) -> None:
    page = TestClient(app).get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"//\w|src=|@import|url\(", page.text)
    assert 'fetch("openapi.json")' in page.text


def check_silence(app: Any) -> None:
    """Every route ends in an error whose text, headers and all, say nothing of its cause."""
    client = TestClient(app, raise_server_exceptions=False)
    for route in routes_of(app):
        path = route.path.replace("{name:path}", "scripted")
        for method in route.methods:
            answer = client.request(method, path, json=BODIES.get(path))
            assert answer.status_code == 500, path
            error = answer.json()["error"]
            assert error["message"] == "internal error (ZeroDivisionError); the server's log has the details"
            told = answer.text + str(answer.headers)
            assert not re.search(r"secret|/home|Traceback|\.py|line \d", told), told


def test_no_handler_tells_of_its_exceptions() -> None:
    app = app_of(ScriptedEngine(silent))

    async def fails(*args: Any, **named: Any) -> None:
        raise ZeroDivisionError(SECRET)

    for route in routes_of(app):
        route.endpoint = fails
    check_silence(app)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_no_stream_tells_of_exceptions(path: str, stream: bool) -> None:
    async def fails(prompt: list[int], params: object) -> Any:
        yield CompletionOutput(0, "a", [97])
        raise ZeroDivisionError(SECRET)

    client = TestClient(app_of(ScriptedEngine(fails)), raise_server_exceptions=False)
    told = client.post(path, json={**BODIES[path], "stream": stream}).text
    assert "internal error (ZeroDivisionError)" in told
    assert not re.search(r"secret|/home|Traceback|\.py", told), told


@pytest.mark.parametrize("path", BODIES)
def test_a_null_is_a_field_not_given(path: str, document: dict[str, Any]) -> None:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = {
        name
        for one in schema.get("oneOf", [schema])
        for name in document["components"]["schemas"][one["$ref"].rpartition("/")[2]]["properties"]
    }
    client = TestClient(app_of(ScriptedEngine(silent)))
    given = client.post(path, json=BODIES[path])
    nulls = client.post(path, json={**dict.fromkeys(names), **BODIES[path]})
    assert given.status_code == nulls.status_code == 200, nulls.text
    assert unchanging(nulls.json()) == unchanging(given.json())


def unchanging(value: Any) -> Any:
    """An answer without what differs from one to the next."""
    if isinstance(value, list):
        return [unchanging(one) for one in value]
    if not isinstance(value, dict):
        return value
    differing = ("id", "created", "created_at", "completed_at", "timings")
    return {name: unchanging(one) for name, one in value.items() if name not in differing}


def test_answers_are_as_the_document_says(document: dict[str, Any]) -> None:
    """Of the scripted engine; schemathesis asks the real one, in tests/clients."""
    client = TestClient(app_of(ScriptedEngine(silent)))
    for path, body in BODIES.items():
        answer = client.post(path, json=body)
        responses = document["paths"][path]["post"]["responses"]
        schema = responses[str(answer.status_code)]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), {**schema, "components": document["components"]})
        bad = client.post(path, json={**body, "model": "nobody"})
        schema = responses["404"]["content"]["application/json"]["schema"]
        jsonschema.validate(bad.json(), {**schema, "components": document["components"]})


@pytest.mark.parametrize("names", [["*"], ["*", "scripted"], ["scripted", "*"]])
def test_any_name_may_be_served(names: list[str]) -> None:
    engine = ScriptedEngine(silent)
    client = TestClient(create_app(cast(Any, engine), served_model_names=names))
    for name in ("gpt-4", "a/b", "scripted"):
        assert client.post("/v1/completions", json={"prompt": "a", "model": name}).json()["model"] == name
        assert client.get(f"/v1/models/{name}").json()["id"] == name
    listed = "scripted" if len(names) == 2 else engine.config.model
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == [listed]
    assert client.post("/v1/completions", json={"prompt": "a"}).json()["model"] == listed
    assert f'model_name="{listed}"' in client.get("/metrics").text


def test_salts_reach_the_engine() -> None:
    asked = []

    class Salted(ScriptedEngine):
        def generate(self, *arguments: Any, cache_salt: str = "", **named: Any) -> Any:
            asked.append(cache_salt)
            return super().generate(*arguments, **named)

    client = TestClient(app_of(Salted(silent)))
    for path in ("/v1/completions", "/v1/chat/completions"):
        client.post(path, json={**BODIES[path], "cache_salt": "mine"})
        client.post(path, json=BODIES[path])
    assert asked == ["mine", "", "mine", ""]
