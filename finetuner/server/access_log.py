"""A line a request: JSON for machines where FINETUNER_LOG_FORMAT=json, else for people."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime, timezone

from finetuner.excepts import ConfigError, unknown_name
from finetuner.server.calls import Call

FORMAT_VARIABLE = 'FINETUNER_LOG_FORMAT'
_FORMATS = ('plain', 'json')
_NAME = 'finetuner.access'


class AccessLog:
    """Writes who asked for what, and what came of it; never contents, parameters or tokens.

    Lines go to the standard error through the logger `finetuner.access`. Standard logging with
    a formatter of its own: a library for these nine fields would be larger than they are.
    """

    def __init__(self) -> None:
        """Set the logger up.

        Raises:
            ConfigError: FINETUNER_LOG_FORMAT is neither `json` nor `plain`.
        """
        name = os.environ.get(FORMAT_VARIABLE) or 'plain'
        if name not in _FORMATS:
            raise ConfigError(unknown_name(f'value of {FORMAT_VARIABLE}', name, _FORMATS))
        self._logger = logging.getLogger(_NAME)
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_JsonFormatter() if name == 'json' else _PlainFormatter())
        self._logger.handlers = [handler]

    def write(self, call: Call, endpoint: str, seconds: float) -> None:
        """Write the line of a request.

        Args:
            call: that was answered.
            endpoint: it is filed under.
            seconds: it took.
        """
        level = logging.WARNING if call.status >= 500 else logging.INFO
        fields = {
            'request_id': call.request_id,
            'protocol': call.protocol,
            'endpoint': endpoint,
            'status': call.status,
            'documents': call.num_documents,
            'milliseconds': round(seconds * 1e3, 2),
            'user': call.user,
        }
        self._logger.log(level, 'request', extra={'fields': fields})


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        written = {'time': _time(record), 'level': record.levelname.lower()}
        written.update(getattr(record, 'fields', {}))
        return json.dumps(written)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        shown = getattr(record, 'fields', {})
        return (
            f'{_time(record)} {record.levelname} {shown["protocol"]} {shown["endpoint"]} '
            f'{shown["status"]} {shown["documents"]} documents {shown["milliseconds"]} ms '
            f'user={shown["user"] or "-"} request={shown["request_id"]}'
        )


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    return moment.isoformat(timespec='milliseconds').replace('+00:00', 'Z')
