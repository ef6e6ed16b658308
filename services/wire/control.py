"""The caller's side of a worker's Control service."""

import grpc.aio

from services.core.worker_report import Role
from services.wire.channel import Network, from_rpc_error, parsed
from services.wire.generated import worker_pb2, worker_pb2_grpc


async def set_role(network: Network, address: str, worker_id: str, role: Role, timeout_s: float) -> str:
    """Change a worker's role; its previous one.

    Raises WorkerLost if nobody answers at the address, or another worker does; PeerRefused without what the
    cluster asks for.
    """
    request = worker_pb2.SetRoleRequest(worker_id=worker_id, role=role)
    async with network.open_channel(address) as channel:
        try:
            reply = await worker_pb2_grpc.ControlStub(channel).SetRole(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, worker_id) from None
    return str(parsed(reply, worker_id).previous_role)
