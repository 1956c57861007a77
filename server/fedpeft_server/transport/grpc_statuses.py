"""Our errors as gRPC says them: one table."""

from __future__ import annotations

import grpc

from fedpeft import errors
from fedpeft.reporting.text import printable
from fedpeft.wire.failures import to_text
from fedpeft_server.transport.refusals import Refused

STATUS: dict[type[errors.FedPEFTError], grpc.StatusCode] = {
    errors.UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.RunFileError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.DataError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.MemoryLimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.TrainingError: grpc.StatusCode.ABORTED,
    errors.StateError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RunExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.UpdateError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.FederationError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.QuorumError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.LimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ProtocolError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.WorkerError: grpc.StatusCode.ABORTED,
    errors.TimeLimitError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.PolicyError: grpc.StatusCode.PERMISSION_DENIED,
    errors.PrivacyError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StorageError: grpc.StatusCode.UNAVAILABLE,
    errors.MissingExtraError: grpc.StatusCode.UNIMPLEMENTED,
    errors.CredentialError: grpc.StatusCode.UNAUTHENTICATED,
    errors.FedPEFTError: grpc.StatusCode.INTERNAL,
}


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Code and text for a caller; of what is not ours, no details."""
    if isinstance(error, Refused):
        return status_of(error.error)
    if isinstance(error, errors.FedPEFTError):
        # What is said goes to the caller's terminal and to our log, and quotes what came.
        return STATUS[type(error)], printable(to_text(error))
    if isinstance(error, TimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED, "FederationError: the other side stalled; try again"
    return grpc.StatusCode.INTERNAL, "FederationError: the server failed; its log says why"
