"""When a part of a local cluster is ready: workers say so in membership, the gateway over HTTP."""

import ssl

import httpx

from services.core.errors import StoreUnavailable
from services.membership.protocol import Membership

PROBE_TIMEOUT_SECONDS = 2.0
PROBE_EVERY_SECONDS = 0.05


class WorkerReadiness:
    """True once for each incarnation of a worker: when its report says ready.

    A killed worker's last report stays until its lease ends; it must not pass for its successor's.
    """

    def __init__(self, membership: Membership, worker_id: str) -> None:
        self._membership = membership
        self._worker_id = worker_id
        self._epoch_seen: int | None = None

    async def __call__(self) -> bool:
        try:
            reports = await self._membership.workers()
        except StoreUnavailable:
            return False
        for report in reports:
            if report.worker_id == self._worker_id and report.state == "ready":
                is_new = report.epoch != self._epoch_seen
                self._epoch_seen = report.epoch
                return is_new
        return False


class GatewayReadiness:
    """Whether the gateway at `root_url` would answer a completion now."""

    def __init__(self, root_url: str, verify: ssl.SSLContext | bool = True) -> None:
        self._root_url = root_url
        self._verify = verify

    async def __call__(self) -> bool:
        answered = await self._get("/health/ready")
        return answered is not None and answered.status_code == httpx.codes.OK

    async def knows(self, worker_ids: set[str]) -> bool:
        """Whether its snapshot has all these workers: it looks at membership a few times a second. One that
        tells only holders of an API key is not asked further."""
        answered = await self._get("/v1/cluster")
        if answered is None or answered.status_code != httpx.codes.OK:
            return answered is not None and answered.status_code == httpx.codes.UNAUTHORIZED
        return worker_ids <= {report["worker_id"] for report in answered.json()}

    async def _get(self, path: str) -> httpx.Response | None:
        """None if there is no answer."""
        # The gateway runs on this machine: a proxy from the environment must not be asked.
        async with httpx.AsyncClient(
            trust_env=False, timeout=PROBE_TIMEOUT_SECONDS, verify=self._verify
        ) as client:
            try:
                return await client.get(self._root_url + path)
            except httpx.HTTPError:
                return None
