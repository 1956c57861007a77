"""Bytes, lengths and outcomes of every call, measured around gRPC's handlers: no service knows of it."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from fedpeft_server.server_metrics import ServerMetrics

_OURS = "/fedpeft."
_CODES = {code.value[0]: code.name.lower().replace("_", "-") for code in grpc.StatusCode}


class Meter(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no annotations
    """Wraps the handlers of our own services; those of health and reflection pass as they are."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """As gRPC asks: the handler of one call, measured."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or not method.startswith(_OURS):
            return handler
        call = method.rpartition("/")[2]  # of a handler that is there: no caller invents one
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        return make(
            self._time_call(call, inner),
            request_deserializer=self._count_in(call, handler.request_deserializer),
            response_serializer=self._count_out(call, handler.response_serializer),
        )

    def _count_in(self, call: str, read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        def counted(content: bytes) -> Any:
            self._metrics.count_received(call, len(content))
            return read(content)

        return counted

    def _count_out(self, call: str, write: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
        def counted(message: Any) -> bytes:
            content = write(message)
            self._metrics.count_sent(call, len(content))
            return content

        return counted

    def _time_call(self, call: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Of the same kind as `inner`: gRPC treats generators and plain coroutines differently."""
        if inspect.isasyncgenfunction(inner):

            async def generator(request: Any, context: Any) -> AsyncIterator[Any]:
                with self._one(call, context):
                    async for message in inner(request, context):
                        yield message

            return generator

        async def plain(request: Any, context: Any) -> Any:
            with self._one(call, context):
                return await inner(request, context)

        return plain

    @contextmanager
    def _one(self, call: str, context: Any) -> Iterator[None]:
        began, code = time.perf_counter(), ""
        try:
            yield
        except asyncio.CancelledError:
            code = "cancelled"
            raise
        except grpc.aio.AbortError:
            raise
        except Exception:
            code = "unknown"
            raise
        finally:
            said = context.code()
            number = said.value[0] if isinstance(said, grpc.StatusCode) else int(said or 0)
            self._metrics.count_call(call, code or _CODES.get(number, "unknown"), time.perf_counter() - began)
