from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FailureCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_CODE_UNSPECIFIED: _ClassVar[FailureCode]
    FAILURE_CODE_INTERNAL: _ClassVar[FailureCode]
    FAILURE_CODE_TASK: _ClassVar[FailureCode]
    FAILURE_CODE_RUN_FILE: _ClassVar[FailureCode]
    FAILURE_CODE_DATA: _ClassVar[FailureCode]
    FAILURE_CODE_MODEL: _ClassVar[FailureCode]
    FAILURE_CODE_MEMORY: _ClassVar[FailureCode]
    FAILURE_CODE_TIME: _ClassVar[FailureCode]
    FAILURE_CODE_WORKER: _ClassVar[FailureCode]
    FAILURE_CODE_TRAINING: _ClassVar[FailureCode]
    FAILURE_CODE_STATE: _ClassVar[FailureCode]
    FAILURE_CODE_STORAGE: _ClassVar[FailureCode]
    FAILURE_CODE_EXTRA: _ClassVar[FailureCode]
    FAILURE_CODE_FEDERATION: _ClassVar[FailureCode]
    FAILURE_CODE_PRIVACY: _ClassVar[FailureCode]
    FAILURE_CODE_CREDENTIAL: _ClassVar[FailureCode]
    FAILURE_CODE_BUSY: _ClassVar[FailureCode]
    FAILURE_CODE_ROWS: _ClassVar[FailureCode]

class PolicyKey(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POLICY_KEY_UNSPECIFIED: _ClassVar[PolicyKey]
    POLICY_KEY_BASE_DIGESTS: _ClassVar[PolicyKey]
    POLICY_KEY_RUNS: _ClassVar[PolicyKey]
    POLICY_KEY_TASKS: _ClassVar[PolicyKey]
    POLICY_KEY_METHODS: _ClassVar[PolicyKey]
    POLICY_KEY_TRAINING: _ClassVar[PolicyKey]
    POLICY_KEY_SPACES: _ClassVar[PolicyKey]
    POLICY_KEY_STAGES: _ClassVar[PolicyKey]
    POLICY_KEY_NEEDS_STAGES: _ClassVar[PolicyKey]
    POLICY_KEY_PRIVACY: _ClassVar[PolicyKey]
    POLICY_KEY_MIN_NOISE_MULTIPLIER: _ClassVar[PolicyKey]
    POLICY_KEY_MAX_RUN_EPSILON: _ClassVar[PolicyKey]
    POLICY_KEY_MAX_TOTAL_EPSILON: _ClassVar[PolicyKey]
    POLICY_KEY_MAX_MEMORY_MIB: _ClassVar[PolicyKey]
    POLICY_KEY_MAX_TASK_S: _ClassVar[PolicyKey]
    POLICY_KEY_MAX_BYTES_PER_DAY: _ClassVar[PolicyKey]
    POLICY_KEY_MAX_LOCAL_STEPS: _ClassVar[PolicyKey]
    POLICY_KEY_ALLOW_DOWNLOAD: _ClassVar[PolicyKey]
    POLICY_KEY_TELL_LIMITS: _ClassVar[PolicyKey]
    POLICY_KEY_CAPABILITIES: _ClassVar[PolicyKey]
    POLICY_KEY_MAX_DELTA: _ClassVar[PolicyKey]
    POLICY_KEY_FIELDS: _ClassVar[PolicyKey]
    POLICY_KEY_ALLOW_FILTERS: _ClassVar[PolicyKey]
    POLICY_KEY_ALLOW_LABEL_MAPS: _ClassVar[PolicyKey]
    POLICY_KEY_MIN_ROWS: _ClassVar[PolicyKey]
    POLICY_KEY_METRICS: _ClassVar[PolicyKey]
    POLICY_KEY_MIN_COUNT: _ClassVar[PolicyKey]
    POLICY_KEY_USER: _ClassVar[PolicyKey]
    POLICY_KEY_NEEDS_CONFINEMENT: _ClassVar[PolicyKey]
    POLICY_KEY_PLUGINS: _ClassVar[PolicyKey]
    POLICY_KEY_MODELS: _ClassVar[PolicyKey]
FAILURE_CODE_UNSPECIFIED: FailureCode
FAILURE_CODE_INTERNAL: FailureCode
FAILURE_CODE_TASK: FailureCode
FAILURE_CODE_RUN_FILE: FailureCode
FAILURE_CODE_DATA: FailureCode
FAILURE_CODE_MODEL: FailureCode
FAILURE_CODE_MEMORY: FailureCode
FAILURE_CODE_TIME: FailureCode
FAILURE_CODE_WORKER: FailureCode
FAILURE_CODE_TRAINING: FailureCode
FAILURE_CODE_STATE: FailureCode
FAILURE_CODE_STORAGE: FailureCode
FAILURE_CODE_EXTRA: FailureCode
FAILURE_CODE_FEDERATION: FailureCode
FAILURE_CODE_PRIVACY: FailureCode
FAILURE_CODE_CREDENTIAL: FailureCode
FAILURE_CODE_BUSY: FailureCode
FAILURE_CODE_ROWS: FailureCode
POLICY_KEY_UNSPECIFIED: PolicyKey
POLICY_KEY_BASE_DIGESTS: PolicyKey
POLICY_KEY_RUNS: PolicyKey
POLICY_KEY_TASKS: PolicyKey
POLICY_KEY_METHODS: PolicyKey
POLICY_KEY_TRAINING: PolicyKey
POLICY_KEY_SPACES: PolicyKey
POLICY_KEY_STAGES: PolicyKey
POLICY_KEY_NEEDS_STAGES: PolicyKey
POLICY_KEY_PRIVACY: PolicyKey
POLICY_KEY_MIN_NOISE_MULTIPLIER: PolicyKey
POLICY_KEY_MAX_RUN_EPSILON: PolicyKey
POLICY_KEY_MAX_TOTAL_EPSILON: PolicyKey
POLICY_KEY_MAX_MEMORY_MIB: PolicyKey
POLICY_KEY_MAX_TASK_S: PolicyKey
POLICY_KEY_MAX_BYTES_PER_DAY: PolicyKey
POLICY_KEY_MAX_LOCAL_STEPS: PolicyKey
POLICY_KEY_ALLOW_DOWNLOAD: PolicyKey
POLICY_KEY_TELL_LIMITS: PolicyKey
POLICY_KEY_CAPABILITIES: PolicyKey
POLICY_KEY_MAX_DELTA: PolicyKey
POLICY_KEY_FIELDS: PolicyKey
POLICY_KEY_ALLOW_FILTERS: PolicyKey
POLICY_KEY_ALLOW_LABEL_MAPS: PolicyKey
POLICY_KEY_MIN_ROWS: PolicyKey
POLICY_KEY_METRICS: PolicyKey
POLICY_KEY_MIN_COUNT: PolicyKey
POLICY_KEY_USER: PolicyKey
POLICY_KEY_NEEDS_CONFINEMENT: PolicyKey
POLICY_KEY_PLUGINS: PolicyKey
POLICY_KEY_MODELS: PolicyKey

class EnrollRequest(_message.Message):
    __slots__ = ("protocol_version", "token", "csr")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    token: str
    csr: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., token: _Optional[str] = ..., csr: _Optional[bytes] = ...) -> None: ...

class EnrollReply(_message.Message):
    __slots__ = ("name", "certificate", "ca_certificate")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CA_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    certificate: bytes
    ca_certificate: bytes
    def __init__(self, name: _Optional[str] = ..., certificate: _Optional[bytes] = ..., ca_certificate: _Optional[bytes] = ...) -> None: ...

class AgentMessage(_message.Message):
    __slots__ = ("hello", "heartbeat", "received", "result", "refusal")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    received: Received
    result: Result
    refusal: Refusal
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., received: _Optional[_Union[Received, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("welcome", "heartbeat", "task", "ack", "cancel", "goodbye", "notice")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    heartbeat: Heartbeat
    task: Task
    ack: Ack
    cancel: Cancel
    goodbye: Goodbye
    notice: Notice
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., task: _Optional[_Union[Task, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "name", "software", "capabilities")
    class CapabilitiesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    name: str
    software: str
    capabilities: _containers.ScalarMap[str, str]
    def __init__(self, protocol_version: _Optional[int] = ..., name: _Optional[str] = ..., software: _Optional[str] = ..., capabilities: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_version", "server", "name", "heartbeat_ms", "max_inline_bytes", "chunk_bytes", "session")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    MAX_INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    server: str
    name: str
    heartbeat_ms: int
    max_inline_bytes: int
    chunk_bytes: int
    session: int
    def __init__(self, protocol_version: _Optional[int] = ..., server: _Optional[str] = ..., name: _Optional[str] = ..., heartbeat_ms: _Optional[int] = ..., max_inline_bytes: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., session: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Content(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    def __init__(self, records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("name", "entries")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    def __init__(self, name: _Optional[str] = ..., entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("name", "integer", "number", "flag", "text", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    integer: int
    number: float
    flag: bool
    text: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., flag: _Optional[bool] = ..., text: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class BlobRef(_message.Message):
    __slots__ = ("digest", "size")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    size: int
    def __init__(self, digest: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "run", "run_digest", "kind", "round", "inline", "blob")
    ID_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    RUN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    run: str
    run_digest: bytes
    kind: str
    round: int
    inline: bytes
    blob: BlobRef
    def __init__(self, id: _Optional[bytes] = ..., run: _Optional[str] = ..., run_digest: _Optional[bytes] = ..., kind: _Optional[str] = ..., round: _Optional[int] = ..., inline: _Optional[bytes] = ..., blob: _Optional[_Union[BlobRef, _Mapping]] = ...) -> None: ...

class Received(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: bytes
    def __init__(self, task: _Optional[bytes] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("task", "inline", "blob", "failure", "signature")
    TASK_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    task: bytes
    inline: bytes
    blob: BlobRef
    failure: Failure
    signature: bytes
    def __init__(self, task: _Optional[bytes] = ..., inline: _Optional[bytes] = ..., blob: _Optional[_Union[BlobRef, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code",)
    CODE_FIELD_NUMBER: _ClassVar[int]
    code: FailureCode
    def __init__(self, code: _Optional[_Union[FailureCode, str]] = ...) -> None: ...

class Objection(_message.Message):
    __slots__ = ("key", "limit")
    KEY_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    key: PolicyKey
    limit: float
    def __init__(self, key: _Optional[_Union[PolicyKey, str]] = ..., limit: _Optional[float] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("task", "objections")
    TASK_FIELD_NUMBER: _ClassVar[int]
    OBJECTIONS_FIELD_NUMBER: _ClassVar[int]
    task: bytes
    objections: _containers.RepeatedCompositeFieldContainer[Objection]
    def __init__(self, task: _Optional[bytes] = ..., objections: _Optional[_Iterable[_Union[Objection, _Mapping]]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("task", "accepted", "reason", "spare")
    TASK_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SPARE_FIELD_NUMBER: _ClassVar[int]
    task: bytes
    accepted: bool
    reason: str
    spare: bool
    def __init__(self, task: _Optional[bytes] = ..., accepted: _Optional[bool] = ..., reason: _Optional[str] = ..., spare: _Optional[bool] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("task", "reason")
    TASK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    task: bytes
    reason: str
    def __init__(self, task: _Optional[bytes] = ..., reason: _Optional[str] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("run", "text")
    RUN_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    run: str
    text: str
    def __init__(self, run: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason", "retry_ms")
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_MS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    retry_ms: int
    def __init__(self, reason: _Optional[str] = ..., retry_ms: _Optional[int] = ...) -> None: ...

class BlobUpload(_message.Message):
    __slots__ = ("open", "chunk")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    open: BlobOpen
    chunk: BlobChunk
    def __init__(self, open: _Optional[_Union[BlobOpen, _Mapping]] = ..., chunk: _Optional[_Union[BlobChunk, _Mapping]] = ...) -> None: ...

class BlobOpen(_message.Message):
    __slots__ = ("digest", "size", "task")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    size: int
    task: bytes
    def __init__(self, digest: _Optional[bytes] = ..., size: _Optional[int] = ..., task: _Optional[bytes] = ...) -> None: ...

class BlobChunk(_message.Message):
    __slots__ = ("offset", "data", "crc32")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    crc32: int
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class BlobProgress(_message.Message):
    __slots__ = ("offset", "complete", "refused")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    offset: int
    complete: bool
    refused: str
    def __init__(self, offset: _Optional[int] = ..., complete: _Optional[bool] = ..., refused: _Optional[str] = ...) -> None: ...

class PullBlobRequest(_message.Message):
    __slots__ = ("digest", "offset", "task")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    task: bytes
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ..., task: _Optional[bytes] = ...) -> None: ...

class SubmitRunRequest(_message.Message):
    __slots__ = ("run_toml", "cohort", "submission", "readers")
    RUN_TOML_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    SUBMISSION_FIELD_NUMBER: _ClassVar[int]
    READERS_FIELD_NUMBER: _ClassVar[int]
    run_toml: str
    cohort: CohortRules
    submission: str
    readers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, run_toml: _Optional[str] = ..., cohort: _Optional[_Union[CohortRules, _Mapping]] = ..., submission: _Optional[str] = ..., readers: _Optional[_Iterable[str]] = ...) -> None: ...

class CohortRules(_message.Message):
    __slots__ = ("min_agents", "agents", "wait_s")
    MIN_AGENTS_FIELD_NUMBER: _ClassVar[int]
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    min_agents: int
    agents: _containers.RepeatedScalarFieldContainer[str]
    wait_s: int
    def __init__(self, min_agents: _Optional[int] = ..., agents: _Optional[_Iterable[str]] = ..., wait_s: _Optional[int] = ...) -> None: ...

class RunInfo(_message.Message):
    __slots__ = ("id", "name", "digest", "status", "detail", "round", "rounds", "agents", "submitted_ms", "updated_ms", "metrics", "epsilon", "adapter_digest", "submitter", "readers", "incomplete", "epsilon_cohort")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_MS_FIELD_NUMBER: _ClassVar[int]
    UPDATED_MS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SUBMITTER_FIELD_NUMBER: _ClassVar[int]
    READERS_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_FIELD_NUMBER: _ClassVar[int]
    EPSILON_COHORT_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    digest: str
    status: str
    detail: str
    round: int
    rounds: int
    agents: _containers.RepeatedScalarFieldContainer[str]
    submitted_ms: int
    updated_ms: int
    metrics: _containers.ScalarMap[str, float]
    epsilon: float
    adapter_digest: str
    submitter: str
    readers: _containers.RepeatedScalarFieldContainer[str]
    incomplete: _containers.RepeatedCompositeFieldContainer[MemberRounds]
    epsilon_cohort: float
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., digest: _Optional[str] = ..., status: _Optional[str] = ..., detail: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., agents: _Optional[_Iterable[str]] = ..., submitted_ms: _Optional[int] = ..., updated_ms: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., epsilon: _Optional[float] = ..., adapter_digest: _Optional[str] = ..., submitter: _Optional[str] = ..., readers: _Optional[_Iterable[str]] = ..., incomplete: _Optional[_Iterable[_Union[MemberRounds, _Mapping]]] = ..., epsilon_cohort: _Optional[float] = ...) -> None: ...

class MemberRounds(_message.Message):
    __slots__ = ("name", "counted", "asked")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    name: str
    counted: int
    asked: int
    def __init__(self, name: _Optional[str] = ..., counted: _Optional[int] = ..., asked: _Optional[int] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class StopRunRequest(_message.Message):
    __slots__ = ("id", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: str
    reason: str
    def __init__(self, id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class ListRunsReply(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunInfo]
    def __init__(self, runs: _Optional[_Iterable[_Union[RunInfo, _Mapping]]] = ...) -> None: ...

class LogsRequest(_message.Message):
    __slots__ = ("id", "follow", "after")
    ID_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    id: str
    follow: bool
    after: int
    def __init__(self, id: _Optional[str] = ..., follow: _Optional[bool] = ..., after: _Optional[int] = ...) -> None: ...

class LogLine(_message.Message):
    __slots__ = ("number", "time_ms", "json")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    number: int
    time_ms: int
    json: str
    def __init__(self, number: _Optional[int] = ..., time_ms: _Optional[int] = ..., json: _Optional[str] = ...) -> None: ...

class PullResultRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ResultChunk(_message.Message):
    __slots__ = ("path", "offset", "size", "data", "crc32", "unfinished")
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    path: str
    offset: int
    size: int
    data: bytes
    crc32: int
    unfinished: Unfinished
    def __init__(self, path: _Optional[str] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[int] = ..., unfinished: _Optional[_Union[Unfinished, _Mapping]] = ...) -> None: ...

class Unfinished(_message.Message):
    __slots__ = ("round", "rounds")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    round: int
    rounds: int
    def __init__(self, round: _Optional[int] = ..., rounds: _Optional[int] = ...) -> None: ...

class AgentInfo(_message.Message):
    __slots__ = ("name", "connected", "address", "last_seen_ms", "capabilities", "results", "refusals", "last_refusal", "revoked", "refused", "calls", "bytes_up", "bytes_down", "certificate_ends_ms")
    class CapabilitiesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_MS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    LAST_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_ENDS_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    connected: bool
    address: str
    last_seen_ms: int
    capabilities: _containers.ScalarMap[str, str]
    results: int
    refusals: int
    last_refusal: str
    revoked: bool
    refused: _containers.ScalarMap[str, int]
    calls: int
    bytes_up: int
    bytes_down: int
    certificate_ends_ms: int
    def __init__(self, name: _Optional[str] = ..., connected: _Optional[bool] = ..., address: _Optional[str] = ..., last_seen_ms: _Optional[int] = ..., capabilities: _Optional[_Mapping[str, str]] = ..., results: _Optional[int] = ..., refusals: _Optional[int] = ..., last_refusal: _Optional[str] = ..., revoked: _Optional[bool] = ..., refused: _Optional[_Mapping[str, int]] = ..., calls: _Optional[int] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., certificate_ends_ms: _Optional[int] = ...) -> None: ...

class ServerInfo(_message.Message):
    __slots__ = ("version", "started_ms", "certificate_ends_ms", "connected", "max_agents", "refused", "refused_nameless")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class RefusedNamelessEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STARTED_MS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_ENDS_MS_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    MAX_AGENTS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_NAMELESS_FIELD_NUMBER: _ClassVar[int]
    version: str
    started_ms: int
    certificate_ends_ms: int
    connected: int
    max_agents: int
    refused: _containers.ScalarMap[str, int]
    refused_nameless: _containers.ScalarMap[str, int]
    def __init__(self, version: _Optional[str] = ..., started_ms: _Optional[int] = ..., certificate_ends_ms: _Optional[int] = ..., connected: _Optional[int] = ..., max_agents: _Optional[int] = ..., refused: _Optional[_Mapping[str, int]] = ..., refused_nameless: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ListAgentsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAgentsReply(_message.Message):
    __slots__ = ("agents", "server", "counted")
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    agents: _containers.RepeatedCompositeFieldContainer[AgentInfo]
    server: ServerInfo
    counted: bool
    def __init__(self, agents: _Optional[_Iterable[_Union[AgentInfo, _Mapping]]] = ..., server: _Optional[_Union[ServerInfo, _Mapping]] = ..., counted: _Optional[bool] = ...) -> None: ...

class IssueTokenRequest(_message.Message):
    __slots__ = ("name", "valid_s", "role")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALID_S_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    valid_s: int
    role: str
    def __init__(self, name: _Optional[str] = ..., valid_s: _Optional[int] = ..., role: _Optional[str] = ...) -> None: ...

class IssueTokenReply(_message.Message):
    __slots__ = ("token", "expires_ms")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_MS_FIELD_NUMBER: _ClassVar[int]
    token: str
    expires_ms: int
    def __init__(self, token: _Optional[str] = ..., expires_ms: _Optional[int] = ...) -> None: ...

class RevokeAgentRequest(_message.Message):
    __slots__ = ("name", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RevokeAgentReply(_message.Message):
    __slots__ = ("revoked",)
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    revoked: bool
    def __init__(self, revoked: _Optional[bool] = ...) -> None: ...
