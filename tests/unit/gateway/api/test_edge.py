"""The ids that the outermost layer gives to a request."""

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from services.core.clock import SystemClock
from services.gateway.api.body import Bodies
from services.gateway.api.edge import Edge
from services.gateway.door.door import Door


async def shows_its_ids(scope, receive, send) -> None:
    state = Request(scope).state
    await JSONResponse([state.request_id, state.client_request_id])(scope, receive, send)


@pytest.fixture
async def http():
    transport = httpx.ASGITransport(Edge(shows_its_ids, SystemClock(), Door(), Bodies(1000, 10_000)))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


async def test_one_id_is_everywhere_when_the_client_gave_none(http) -> None:
    answered = await http.get("/")
    assert answered.json() == [answered.headers["X-Request-Id"]] * 2


async def test_the_client_s_id_goes_back_and_ours_stays_unique(http) -> None:
    answers = [await http.get("/", headers={"X-Request-Id": "same"}) for _ in range(2)]
    assert [answered.headers["X-Request-Id"] for answered in answers] == ["same", "same"]
    ours = {answered.json()[0] for answered in answers}
    assert len(ours) == 2
    assert "same" not in ours
