"""The gateway in front of the Executors: gRPC and HTTP, tokens, limits, and an orderly end."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from jina.parsers import set_gateway_parser
from jina.serve.runtimes.gateway.composite import CompositeGateway
from jina.serve.runtimes.servers.grpc import GRPCServer
from jina.serve.runtimes.servers.http import HTTPServer

from finetuner.config import Settings
from finetuner.excepts import ConfigError, unknown_name
from finetuner.server import messages  # noqa: F401 - pickles are refused where it is imported
from finetuner.server.access_log import AccessLog
from finetuner.server.dispatch import Dispatcher
from finetuner.server.grpc_door import GrpcDoor, TokenInterceptor
from finetuner.server.grpc_guard import GrpcGuard
from finetuner.server.health import HealthServicer, Readiness
from finetuner.server.http import HttpServer
from finetuner.server.http_door import Door
from finetuner.server.identity import IdentitySeal
from finetuner.server.journal import Journal
from finetuner.server.limits import ByteBudget, Limits, Slots
from finetuner.server.security import TokenCheck, refuse_open_server
from finetuner.server.telemetry import GatewayMetrics

# what Jina hands over beside the options of its command line
_OF_JINA = ('metas', 'requests', 'runtime_args', 'req_handler_cls', 'req_handler', 'is_cancel')
_OPTIONS = ('runs', *Limits.__dataclass_fields__)
# of the path of a Unix socket
_MOST_PATH_BYTES = 100
# fewer than those with which the guard closes a connection
_MAX_STREAMS = 1_000
# what a finished answer needs to leave this process
_FLUSH_SECONDS = 1.0


class Gateway(CompositeGateway):
    """Jina's composite gateway with our manners.

    In a Flow: `gateway: {uses: finetuner.server.gateway.Gateway, protocol: [grpc, http],
    port: [51000, 51080], uses_with: {max_documents: 1000}}`; docs/operations.md tells of the
    options. Where there are tokens, every request but health needs one.

    Raises:
        ConfigError: the Flow binds an address that others can reach, and no token is set; or an
            option is unknown or out of range.
    """

    def __init__(
        self,
        runs: bool = True,
        max_request_mb: float = Limits.max_request_mb,
        max_total_mb: float = Limits.max_total_mb,
        max_documents: int = Limits.max_documents,
        max_requests: int = Limits.max_requests,
        request_seconds: float = Limits.request_seconds,
        slow_client_seconds: float = Limits.slow_client_seconds,
        drain_seconds: float = Limits.drain_seconds,
        drain_limit_seconds: float = Limits.drain_limit_seconds,
        **kwargs: Any,
    ) -> None:
        """Let Jina build its servers, then take our places in them.

        Args:
            runs: whether runs can be submitted and watched here: the REST API and the pages.
            max_request_mb: see `Limits`, as for all that follow.
            max_total_mb: of all requests together.
            max_documents: of one request.
            max_requests: at the same time.
            request_seconds: for embeddings and searches.
            slow_client_seconds: for the head of an HTTP request.
            drain_seconds: from the signal to end to the refusal of requests.
            drain_limit_seconds: for those that still run then.
            kwargs: what Jina hands every gateway.
        """
        _refuse_unknown(kwargs)
        self._limits = Limits(
            max_request_mb=max_request_mb,
            max_total_mb=max_total_mb,
            max_documents=max_documents,
            max_requests=max_requests,
            request_seconds=request_seconds,
            slow_client_seconds=slow_client_seconds,
            drain_seconds=drain_seconds,
            drain_limit_seconds=drain_limit_seconds,
        )
        super().__init__(**kwargs)
        token = TokenCheck.from_environment()
        refuse_open_server(self.host, token)
        self._slots = Slots(self._limits.max_requests)
        self._budget = ByteBudget(self._limits.max_total_bytes)
        self._readiness = Readiness(self.streamer)
        metrics = GatewayMetrics(getattr(self, 'metrics_registry', None))
        journal = Journal(metrics, AccessLog())
        dispatcher = Dispatcher(
            self.streamer,
            IdentitySeal.of_home(Settings.from_environment().home),
            self._limits,
            self._slots,
            self.tracer,
            self.logger,
            metrics,
        )
        GrpcDoor(dispatcher, journal, self._budget).stand_in(self._request_handler)
        # gRPC listens there, behind the guards
        self._sockets = tempfile.TemporaryDirectory(prefix='finetuner-')
        self._guarded: list[tuple[str, int, str]] = []
        self._guards: list[GrpcGuard] = []
        door = Door(
            token,
            self._limits,
            self._slots,
            self._budget,
            self._readiness,
            journal,
            dispatcher,
            runs,
        )
        for i, (server, arguments) in enumerate(
            zip(self.servers, self._server_kwargs, strict=True)
        ):
            if isinstance(server, HTTPServer):
                self.servers[i] = HttpServer.with_door(door, arguments)
            elif isinstance(server, GRPCServer):
                self._equip(server, token)

    def _equip(self, server: GRPCServer, token: TokenCheck) -> None:
        others = server.grpc_tracing_server_interceptors or []
        server.grpc_tracing_server_interceptors = [TokenInterceptor(token), *others]
        server.health_servicer = HealthServicer(self._readiness)
        server.grpc_server_options = {
            **dict(server.grpc_server_options or {}),
            'grpc.max_receive_message_length': self._limits.max_request_bytes,
            # of a connection; a client with more calls waits with them
            'grpc.max_concurrent_streams': _MAX_STREAMS,
            # compressed messages are refused: gRPC unpacks before it looks, and a few kilobytes
            # can be gigabytes
            'grpc.compression_enabled_algorithms_bitset': 1,
        }
        if not server.ssl_keyfile:  # what is encrypted only gRPC can read
            self._guard(server)

    def _guard(self, server: GRPCServer) -> None:
        arguments = server.runtime_args
        path = str(Path(self._sockets.name) / f'{server.port}.sock')
        if len(path.encode()) > _MOST_PATH_BYTES:
            raise ConfigError(
                f'a socket cannot be at {path!r}, which is longer than {_MOST_PATH_BYTES} bytes: '
                'set TMPDIR to a shorter one'
            )
        self._guarded.append((arguments.host, server.port, path))
        arguments.host, arguments.port = 'unix', path

    async def setup_server(self) -> None:
        """Start the servers, and then what stands before them."""
        await super().setup_server()
        for host, port, path in self._guarded:
            guard = GrpcGuard(self._limits, self._budget)
            await guard.start(host, port, path)
            self._guards.append(guard)

    async def shutdown(self) -> None:
        """End so that nobody who was let in notices: not ready, no new requests, wait, end."""
        self._readiness.drain()
        grpc_servers = [server for server in self.servers if isinstance(server, GRPCServer)]
        for server in grpc_servers:
            await server.health_servicer.enter_graceful_shutdown()
        await asyncio.sleep(self._limits.drain_seconds)
        self._slots.is_closed = True
        for server in self.servers:
            if isinstance(server, HttpServer):
                server.end_streams()
        for guard in self._guards:
            await guard.refuse_new()
        limit = self._limits.drain_limit_seconds
        stopping = [
            asyncio.create_task(server.server.stop(grace=limit))
            for server in grpc_servers
            if server.server is not None
        ]
        if not await self._run_out(stopping, limit):
            self.logger.warning(
                f'{self._slots.in_flight} requests did not end in {limit:g} s: they are cut off'
            )
        await super().shutdown()
        for guard in self._guards:
            await guard.close()
        self._sockets.cleanup()

    async def _run_out(self, stopping: list[asyncio.Task], seconds: float) -> bool:
        """Wait for what runs; whether it ended in time.

        A stream with no request in it, such as one that watches health, may stay open for ever.
        """
        until = time.monotonic() + seconds
        while await self._slots.empty(until - time.monotonic()):
            if not stopping:
                return True
            _, open_still = await asyncio.wait(stopping, timeout=_FLUSH_SECONDS)
            if not open_still or not self._slots.in_flight:
                return True
        return False


def _refuse_unknown(given: dict[str, Any]) -> None:
    """A misspelt option must not leave its limit as it was."""
    known = {*vars(set_gateway_parser().parse_args([])), *_OPTIONS, *_OF_JINA}
    for name in given:
        if name not in known:
            raise ConfigError(unknown_name('option of the gateway', name, _OPTIONS))
