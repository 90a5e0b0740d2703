"""The directory where the processes of a Flow put their metrics; imports no prometheus_client.

prometheus_client decides when it is imported whether it writes there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

DIRECTORY_VARIABLE = 'PROMETHEUS_MULTIPROC_DIR'


@contextmanager
def metrics_directory() -> Iterator[None]:
    """Have this process, and those it starts, write metrics to a private directory until the end.

    One that the variable PROMETHEUS_MULTIPROC_DIR names already is used, and left.
    """
    if DIRECTORY_VARIABLE in os.environ:
        yield
        return
    # what is still written while processes end must not fail the end
    with tempfile.TemporaryDirectory(
        prefix='finetuner-metrics-', ignore_cleanup_errors=True
    ) as directory:
        os.environ[DIRECTORY_VARIABLE] = directory
        try:
            yield
        finally:
            os.environ.pop(DIRECTORY_VARIABLE, None)
