"""The front door of every call: who it is, whether there is room for it, and whether its message is one.

gRPC's generated handlers parse before anyone has counted the call, and write a traceback for each message
that is none. Here a message is parsed by us, and what cannot be is one more refusal.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from fedpeft.errors import FedPEFTError, UpdateError
from fedpeft_server.transport.callers import Gate
from fedpeft_server.transport.grpc_options import TransportOptions
from fedpeft_server.transport.rate_limits import RateLimits
from fedpeft_server.transport.refusals import Reason, Refused


@dataclass(frozen=True)
class Unreadable:
    """Takes the place of a message that is none; `refused` says why."""

    refused: Refused


class RequestGuard:
    """Makes handlers for gRPC from a servicer's methods.

    Args:
        options: how many bytes a message may have; gRPC's own bound is a little wider, so that what is beyond
            ours is counted here.
    """

    def __init__(self, gate: Gate, shares: RateLimits, options: TransportOptions) -> None:
        self._gate, self._shares, self._options = gate, shares, options

    def handlers(self, service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler:
        """All methods of a service.

        A method whose answer is a stream writes it to its context, or is an asynchronous generator; one whose
        request is a stream reads it from its context, where an `Unreadable` may come.
        """
        return grpc.method_handlers_generic_handler(
            service.full_name,
            {
                method.name: self._handler(method, getattr(servicer, method.name))
                for method in service.methods
            },
        )

    def _handler(self, method: MethodDescriptor, call: Callable[..., Any]) -> grpc.RpcMethodHandler:
        kind = GetMessageClass(method.input_type)
        most = self._options.most_bytes(kind)
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[method.client_streaming, method.server_streaming]
        work = self._guard_stream(call) if method.server_streaming else call
        return make(
            self._guard(work),
            request_deserializer=lambda content: _read(kind, content, most),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )

    def _guard(self, call: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def guarded(request: Any, context: Any) -> Any:
            name = self._gate.share(context)
            try:
                with self._shares.call(name):
                    if isinstance(request, Unreadable):
                        raise request.refused
                    return await call(request, context)
            except (Refused, FedPEFTError, TimeoutError) as error:
                await context.abort(*self._shares.end_call(name, error))

        return guarded

    def _guard_stream(self, call: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Awaitable[None]]:
        async def streamed(request: Any, context: Any) -> None:
            answer = call(request, context)
            if not hasattr(answer, "__aiter__"):
                await answer
                return
            async for message in answer:
                await context.write(message)

        return streamed


def _read(kind: type[Message], content: bytes, most: int) -> Message | Unreadable:
    if len(content) > most:
        error = UpdateError(f"a message of {len(content)} bytes came, at most {most} are taken")
        return Unreadable(Refused(Reason.TOO_LARGE, error))
    try:
        return kind.FromString(content)
    except DecodeError:
        error = UpdateError(f"{len(content)} bytes came that are no {kind.DESCRIPTOR.name}")
        return Unreadable(Refused(Reason.MALFORMED, error))
