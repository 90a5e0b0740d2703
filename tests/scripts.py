"""Flows started by a script of their own.

Jina forks the process that starts a Flow, and gRPC, once it was used there with asyncio, now and
then crashes such a process. So tests, which share one process, start no Flow in it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def run_script(code: str, folder: Path | None = None, seconds: float = 150) -> str:
    """Run Python code as people run a script, with the library and examples at hand.

    Args:
        code: the script.
        folder: where to run it; by default the repository's root.
        seconds: it and all it started are killed after that.

    Returns:
        What it printed.
    """
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([str(REPOSITORY), str(REPOSITORY / 'examples')]),
        'JINA_OPTOUT_TELEMETRY': '1',
    }
    process = subprocess.Popen(
        [sys.executable, '-c', code],
        cwd=folder or REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output
