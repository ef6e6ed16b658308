"""The Control service: what an operator changes in a running worker."""

import logging
from collections.abc import Callable
from typing import get_args

import grpc.aio

from services.core.errors import BadRequest, DiptychError, WorkerLost
from services.core.worker_report import Role
from services.engine.incarnation import Incarnation
from services.wire.channel import abort
from services.wire.generated import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)


class ControlService(worker_pb2_grpc.ControlServicer):
    def __init__(self, incarnation: Incarnation, on_role: Callable[[], None]) -> None:
        """`on_role` is called after a change."""
        self._incarnation = incarnation
        self._on_role = on_role

    async def SetRole(
        self,
        request: worker_pb2.SetRoleRequest,
        context: "grpc.aio.ServicerContext[worker_pb2.SetRoleRequest, worker_pb2.SetRoleReply]",
    ) -> worker_pb2.SetRoleReply:
        try:
            previous = self._set_role(request)
        except DiptychError as error:
            await abort(context, error)
        return worker_pb2.SetRoleReply(previous_role=previous)

    def _set_role(self, request: worker_pb2.SetRoleRequest) -> Role:
        incarnation = self._incarnation
        if request.worker_id != incarnation.key.worker_id:
            raise WorkerLost(f"this address belongs to {incarnation.key.worker_id}, not {request.worker_id}")
        role = next((role for role in get_args(Role) if role == request.role), None)
        if role is None:
            raise BadRequest(f"role must be prefill, decode or both, not {request.role!r}", "role")
        previous, incarnation.role = incarnation.role, role
        if previous != role:
            logger.info("role changed from %s to %s", previous, role)
            self._on_role()
        return previous
