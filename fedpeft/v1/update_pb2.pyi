from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_INT64: _ClassVar[DType]

class Relation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RELATION_NONE: _ClassVar[Relation]
    RELATION_SIZE: _ClassVar[Relation]
    RELATION_SUPPORT: _ClassVar[Relation]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_INT64: DType
RELATION_NONE: Relation
RELATION_SIZE: Relation
RELATION_SUPPORT: Relation

class TensorHead(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Index(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorHead]
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorHead, _Mapping]]] = ...) -> None: ...

class Dense(_message.Message):
    __slots__ = ("index", "padding", "values")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    index: Index
    padding: bytes
    values: bytes
    def __init__(self, index: _Optional[_Union[Index, _Mapping]] = ..., padding: _Optional[bytes] = ..., values: _Optional[bytes] = ...) -> None: ...

class Coded(_message.Message):
    __slots__ = ("layout_digest", "tensors")
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    layout_digest: bytes
    tensors: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, layout_digest: _Optional[bytes] = ..., tensors: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SeedScalars(_message.Message):
    __slots__ = ("num_seeds", "amounts")
    NUM_SEEDS_FIELD_NUMBER: _ClassVar[int]
    AMOUNTS_FIELD_NUMBER: _ClassVar[int]
    num_seeds: int
    amounts: bytes
    def __init__(self, num_seeds: _Optional[int] = ..., amounts: _Optional[bytes] = ...) -> None: ...

class ProjectedBlock(_message.Message):
    __slots__ = ("block", "num_seeds", "amounts", "relation", "of")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_SEEDS_FIELD_NUMBER: _ClassVar[int]
    AMOUNTS_FIELD_NUMBER: _ClassVar[int]
    RELATION_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    block: str
    num_seeds: int
    amounts: bytes
    relation: Relation
    of: str
    def __init__(self, block: _Optional[str] = ..., num_seeds: _Optional[int] = ..., amounts: _Optional[bytes] = ..., relation: _Optional[_Union[Relation, str]] = ..., of: _Optional[str] = ...) -> None: ...

class Projected(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[ProjectedBlock]
    def __init__(self, blocks: _Optional[_Iterable[_Union[ProjectedBlock, _Mapping]]] = ...) -> None: ...

class MaskedTensor(_message.Message):
    __slots__ = ("name", "shape", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Masked(_message.Message):
    __slots__ = ("modulus_bits", "tensors")
    MODULUS_BITS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    modulus_bits: int
    tensors: _containers.RepeatedCompositeFieldContainer[MaskedTensor]
    def __init__(self, modulus_bits: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[MaskedTensor, _Mapping]]] = ...) -> None: ...

class Stage(_message.Message):
    __slots__ = ("kind", "parameters")
    KIND_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    parameters: str
    def __init__(self, kind: _Optional[str] = ..., parameters: _Optional[str] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("protocol_version", "run_digest", "round", "client", "state_digest", "space", "weight", "metrics", "base_digest", "stages")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    run_digest: bytes
    round: int
    client: str
    state_digest: bytes
    space: str
    weight: int
    metrics: _containers.ScalarMap[str, float]
    base_digest: bytes
    stages: _containers.RepeatedCompositeFieldContainer[Stage]
    def __init__(self, protocol_version: _Optional[int] = ..., run_digest: _Optional[bytes] = ..., round: _Optional[int] = ..., client: _Optional[str] = ..., state_digest: _Optional[bytes] = ..., space: _Optional[str] = ..., weight: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., base_digest: _Optional[bytes] = ..., stages: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("header", "checksum", "dense", "sparse", "ternary", "quantised", "sign", "seed_scalars", "projected", "masked")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    TERNARY_FIELD_NUMBER: _ClassVar[int]
    QUANTISED_FIELD_NUMBER: _ClassVar[int]
    SIGN_FIELD_NUMBER: _ClassVar[int]
    SEED_SCALARS_FIELD_NUMBER: _ClassVar[int]
    PROJECTED_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    header: Header
    checksum: int
    dense: Dense
    sparse: Coded
    ternary: Coded
    quantised: Coded
    sign: Coded
    seed_scalars: SeedScalars
    projected: Projected
    masked: Masked
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., checksum: _Optional[int] = ..., dense: _Optional[_Union[Dense, _Mapping]] = ..., sparse: _Optional[_Union[Coded, _Mapping]] = ..., ternary: _Optional[_Union[Coded, _Mapping]] = ..., quantised: _Optional[_Union[Coded, _Mapping]] = ..., sign: _Optional[_Union[Coded, _Mapping]] = ..., seed_scalars: _Optional[_Union[SeedScalars, _Mapping]] = ..., projected: _Optional[_Union[Projected, _Mapping]] = ..., masked: _Optional[_Union[Masked, _Mapping]] = ...) -> None: ...
