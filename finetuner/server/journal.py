"""Where requests are written down when they are answered: metrics and the access log."""

from __future__ import annotations

import time

from finetuner.server.access_log import AccessLog
from finetuner.server.calls import Call
from finetuner.server.telemetry import GatewayMetrics

# paths of HTTP that are no endpoint are filed under their first part; any other name is nobody's
_PLACES = ('api', 'dry_run', 'health', 'metrics', 'static', 'swagger', 'ui', 'v1')
_QUIET = ('/health', '/metrics', '/static', '/swagger', '/dry_run')
_OTHER = 'other'


class Journal:
    """Measures and logs each request once.

    Args:
        metrics: of the gateway.
        log: of accesses.
    """

    def __init__(self, metrics: GatewayMetrics, log: AccessLog) -> None:
        self.metrics = metrics
        self._log = log

    def finish(self, call: Call, path: str = '') -> None:
        """Write a request down.

        Args:
            call: that was answered.
            path: of HTTP, where the call is of no endpoint.
        """
        seconds = time.perf_counter() - call.started
        endpoint = call.endpoint or _place(path)
        self.metrics.answered(call, endpoint, seconds)
        # what asks every second, whoever is there, would hide who does
        if call.status == 500 or endpoint not in _QUIET:
            self._log.write(call, endpoint, seconds)


def _place(path: str) -> str:
    if path == '/':
        return path
    first = path.split('/', 2)[1] if path.startswith('/') else ''
    return f'/{first}' if first in _PLACES else _OTHER
