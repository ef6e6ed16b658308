"""Answers that later requests can go on from: what of them is kept, and whose they are."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from pydantic import TypeAdapter

from services.core.errors import BadRequest, StoreUnavailable, UnknownResponse
from services.gateway.api.responses_api.request import Item
from services.gateway.api.responses_api.response import ResponseObject
from services.gateway.door.tenant import Tenant
from services.history.protocol import History

logger = logging.getLogger(__name__)

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
_OURS = re.compile(r"resp_[0-9a-f]{32}")


class Kept(msgspec.Struct):
    response: msgspec.Raw  # as the client got it
    conversation: msgspec.Raw  # items: all that was said up to and with the answer


class KeptResponses:
    """`bytes_max` bounds one answer with the conversation before it; a larger one is not kept."""

    def __init__(self, history: History, bytes_max: int) -> None:
        self._history, self._bytes_max = history, bytes_max

    async def conversation(self, tenant: Tenant, response_id: str) -> list[Item]:
        """Up to and with that answer. Raises BadRequest or StoreUnavailable."""
        kept = await self._get(tenant, response_id)
        if kept is None:
            raise BadRequest(
                f"Previous response with id '{response_id:.100}' not found.",
                "previous_response_id",
                "previous_response_not_found",
            )
        return _ITEMS.validate_json(bytes(kept.conversation))

    async def response(self, tenant: Tenant, response_id: str) -> bytes:
        """As JSON. Raises UnknownResponse or StoreUnavailable."""
        kept = await self._get(tenant, response_id)
        if kept is None:
            raise _unknown(response_id)
        return bytes(kept.response)

    async def delete(self, tenant: Tenant, response_id: str) -> None:
        """Raises UnknownResponse or StoreUnavailable."""
        if not _OURS.fullmatch(response_id):
            raise _unknown(response_id)
        with _in_clients_words():
            if not await self._history.delete(_owner(tenant), response_id):
                raise _unknown(response_id)

    async def keep(self, tenant: Tenant, response: ResponseObject, before: list[Item]) -> None:
        """Keep it, or say in it that it is not kept: its client has its answer in any case."""
        said = _ITEMS.dump_python(before, exclude_none=True, by_alias=True)
        output = [item.model_dump(exclude={"status"}) for item in response.output]
        conversation = msgspec.Raw(msgspec.json.encode([*said, *output]))
        kept = Kept(msgspec.Raw(response.model_dump_json().encode()), conversation)
        document = msgspec.json.encode(kept)
        try:
            if len(document) > self._bytes_max:
                raise StoreUnavailable(f"it has {len(document)} bytes, and {self._bytes_max} are allowed")
            await self._history.put(_owner(tenant), response.id, document)
        except StoreUnavailable as error:
            logger.warning("the answer %s is not kept: %s", response.id, error.message)
            response.store = False

    async def _get(self, tenant: Tenant, response_id: str) -> Kept | None:
        if not _OURS.fullmatch(response_id):
            return None
        with _in_clients_words():
            document = await self._history.get(_owner(tenant), response_id)
        return None if document is None else msgspec.json.decode(document, type=Kept)


@contextmanager
def _in_clients_words() -> Iterator[None]:
    """Where Redis is does not concern clients."""
    try:
        yield
    except StoreUnavailable as error:
        logger.warning("kept answers cannot be reached: %s", error.message)
        raise StoreUnavailable(
            "Earlier responses cannot be reached now. Try again in a moment, or send the whole conversation."
        ) from error


def _owner(tenant: Tenant) -> str:
    """What nobody else has, of those without a key together. Keys of one cache group differ in their ids,
    keys that are told apart by digests in the longer one, too."""
    return tenant.id + tenant.salt("kept responses", "key")


def _unknown(response_id: str) -> UnknownResponse:
    return UnknownResponse(f"Response with id '{response_id:.100}' not found.", "response_id")
