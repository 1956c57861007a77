from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class StateMessage(_message.Message):
    __slots__ = ("protocol_version", "state_digest", "keep", "whole", "steps")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    state_digest: bytes
    keep: bool
    whole: bytes
    steps: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, protocol_version: _Optional[int] = ..., state_digest: _Optional[bytes] = ..., keep: _Optional[bool] = ..., whole: _Optional[bytes] = ..., steps: _Optional[_Iterable[bytes]] = ...) -> None: ...
