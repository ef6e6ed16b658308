from services.wire.generated import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Compatibility(_message.Message):
    __slots__ = ("model", "revision", "quantization", "kv_dtype", "block_size", "layout", "wire_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    quantization: str
    kv_dtype: str
    block_size: int
    layout: str
    wire_version: int
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., quantization: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., layout: _Optional[str] = ..., wire_version: _Optional[int] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("transfer_id", "first_token", "epoch", "compatibility", "transports", "reach")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    COMPATIBILITY_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    REACH_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    first_token: int
    epoch: int
    compatibility: Compatibility
    transports: _containers.RepeatedScalarFieldContainer[str]
    reach: Reach
    def __init__(self, transfer_id: _Optional[str] = ..., first_token: _Optional[int] = ..., epoch: _Optional[int] = ..., compatibility: _Optional[_Union[Compatibility, _Mapping]] = ..., transports: _Optional[_Iterable[str]] = ..., reach: _Optional[_Union[Reach, _Mapping]] = ...) -> None: ...

class Reach(_message.Message):
    __slots__ = ("machine", "rdma")
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    RDMA_FIELD_NUMBER: _ClassVar[int]
    machine: str
    rdma: bool
    def __init__(self, machine: _Optional[str] = ..., rdma: _Optional[bool] = ...) -> None: ...

class LendRequest(_message.Message):
    __slots__ = ("transfer_id", "token_ids", "salt", "epoch", "compatibility")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    COMPATIBILITY_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    salt: str
    epoch: int
    compatibility: Compatibility
    def __init__(self, transfer_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., salt: _Optional[str] = ..., epoch: _Optional[int] = ..., compatibility: _Optional[_Union[Compatibility, _Mapping]] = ...) -> None: ...

class LendReply(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    def __init__(self, tokens: _Optional[int] = ...) -> None: ...

class KvMessage(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: KvHeader
    chunk: KvChunk
    def __init__(self, header: _Optional[_Union[KvHeader, _Mapping]] = ..., chunk: _Optional[_Union[KvChunk, _Mapping]] = ...) -> None: ...

class KvHeader(_message.Message):
    __slots__ = ("block_size", "nixl_pool", "obstacle")
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NIXL_POOL_FIELD_NUMBER: _ClassVar[int]
    OBSTACLE_FIELD_NUMBER: _ClassVar[int]
    block_size: int
    nixl_pool: bytes
    obstacle: str
    def __init__(self, block_size: _Optional[int] = ..., nixl_pool: _Optional[bytes] = ..., obstacle: _Optional[str] = ...) -> None: ...

class KvChunk(_message.Message):
    __slots__ = ("first_token", "tokens", "payload", "crc32c", "firsts", "exposed_ms", "blocks")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    FIRSTS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_MS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    first_token: int
    tokens: int
    payload: bytes
    crc32c: int
    firsts: _containers.RepeatedCompositeFieldContainer[_worker_pb2.SampledToken]
    exposed_ms: float
    blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, first_token: _Optional[int] = ..., tokens: _Optional[int] = ..., payload: _Optional[bytes] = ..., crc32c: _Optional[int] = ..., firsts: _Optional[_Iterable[_Union[_worker_pb2.SampledToken, _Mapping]]] = ..., exposed_ms: _Optional[float] = ..., blocks: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("transfer_id", "epoch")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ("valid",)
    VALID_FIELD_NUMBER: _ClassVar[int]
    valid: bool
    def __init__(self, valid: _Optional[bool] = ...) -> None: ...
