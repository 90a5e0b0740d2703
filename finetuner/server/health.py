"""Whether the service can answer: every Executor reached, and ready where it can tell."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
from docarray import DocumentArray
from grpc_health.v1 import health, health_pb2
from jina.excepts import InternalNetworkError
from jina.proto import jina_pb2
from jina.serve.executors import __dry_run_endpoint__ as DRY_RUN
from jina.types.request.data import DataRequest

from finetuner.server.dispatch import executors_of

READY = '/ready'
_KEEP_SECONDS = 1.0
_WAIT_SECONDS = 3.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Readiness:
    """Asks the Executors, at most once a second.

    Args:
        streamer: Jina's gateway streamer.
    """

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._lock = asyncio.Lock()
        self._asked = -_KEEP_SECONDS
        self._missing: dict[str, str] = {}
        self._is_draining = False

    def drain(self) -> None:
        """Be not ready from now on: the server is about to end."""
        self._is_draining = True

    async def missing(self) -> dict[str, str]:
        """What is not ready, and why; empty when all is."""
        if self._is_draining:
            return {'gateway': 'the server is about to end'}
        async with self._lock:
            if time.monotonic() - self._asked >= _KEEP_SECONDS:
                self._missing = await self._ask()
                self._asked = time.monotonic()
        return self._missing

    async def _ask(self) -> dict[str, str]:
        nodes = executors_of(self._streamer)
        reasons = await asyncio.gather(*[self._ask_one(node) for node in nodes])
        return {node.name: reason for node, reason in zip(nodes, reasons, strict=True) if reason}

    async def _ask_one(self, node: Any) -> str | None:
        try:
            return await asyncio.wait_for(self._reason(node), _WAIT_SECONDS)
        except asyncio.TimeoutError:
            return f'did not answer in {_WAIT_SECONDS:g} s'
        except (InternalNetworkError, grpc.RpcError, ConnectionError):
            return 'is not reachable'

    async def _reason(self, node: Any) -> str | None:
        pool = self._streamer._connection_pool
        if node.endpoints is None:
            await node.get_endpoints(pool, [], [])
        endpoint = READY if READY in node.endpoints else DRY_RUN
        request = DataRequest()
        request.header.exec_endpoint = endpoint
        request.data.docs = DocumentArray()
        result = await pool.send_requests_once(
            requests=[request], deployment=node.name, head=True, endpoint=endpoint, retries=0
        )
        if isinstance(result, BaseException):
            raise result
        answer = result[0]
        if answer.header.status.code == jina_pb2.StatusProto.ERROR:
            return 'failed'
        if endpoint == DRY_RUN:
            return None
        docs = answer.data.docs
        tags = docs[0].tags if len(docs) else {}
        if tags.get('ready') is True:
            return None
        return str(tags.get('reason') or 'is not ready')


class HealthServicer(health.aio.HealthServicer):
    """grpc.health.v1 with the same answer for every service: that of `Readiness`.

    Args:
        readiness: asked at each check, and each second while somebody watches.
    """

    def __init__(self, readiness: Readiness) -> None:
        super().__init__()
        self._readiness = readiness

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        """Answer once."""
        await self._refresh()
        return await super().Check(request, context)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """Answer now, and whenever it changes."""
        await self._refresh()
        refreshing = asyncio.create_task(self._keep_fresh())
        try:
            await super().Watch(request, context)
        finally:
            refreshing.cancel()

    async def drain(self) -> None:
        """Say at once that nothing is served any more."""
        await self.enter_graceful_shutdown()

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(_KEEP_SECONDS)
            await self._refresh()

    async def _refresh(self) -> None:
        status = _NOT_SERVING if await self._readiness.missing() else _SERVING
        for service, before in list(self._server_status.items()):
            if before != status:
                await self.set(service, status)
