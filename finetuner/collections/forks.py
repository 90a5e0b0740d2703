"""Processes fork only while what works here in the background holds no lock.

A child has the locks of all threads of its parent, but not the threads that would open them: of a module
that was being imported, of HDF5, of SQLite. So a thread that works says between its steps that it may be
left there, and who forks waits for that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# should something that never comes to its next step fork, it does so as it would without all this
_MOST_SECONDS = 10.0


class _Forks:
    """Who works, and who forks."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_forking = 0
        self._at_work: set[int] = set()

    def begin(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._num_forking)
            self._at_work.add(threading.get_ident())

    def end(self) -> None:
        with self._changed:
            self._at_work.discard(threading.get_ident())
            self._changed.notify_all()

    def step(self) -> None:
        if self._num_forking and threading.get_ident() in self._at_work:
            self.end()
            self.begin()

    def before(self) -> None:
        mine = {threading.get_ident()}
        with self._changed:
            self._num_forking += 1
            self._changed.wait_for(lambda: self._at_work <= mine, _MOST_SECONDS)

    def after_in_parent(self) -> None:
        with self._changed:
            self._num_forking -= 1
            self._changed.notify_all()


_forks = _Forks()
_is_registered = False
_registering = threading.Lock()


def watch_forks() -> None:
    """Have forks wait from now on; called by who begins something in the background.

    What is registered last is asked first: so what this must wait for goes on until all have come to
    rest, since locks of modules imported before are taken after that.
    """
    global _is_registered
    with _registering:
        if _is_registered or not hasattr(os, 'register_at_fork'):
            return
        _is_registered = True
        # they have functions of their own for forks, which take locks that a step may need
        import concurrent.futures.thread  # noqa: F401
        import logging  # noqa: F401

        import h5py  # noqa: F401

        os.register_at_fork(
            before=lambda: _forks.before(),
            after_in_parent=lambda: _forks.after_in_parent(),
            after_in_child=_forget,
        )


@contextmanager
def at_work() -> Iterator[None]:
    """While in here, other threads fork between steps only."""
    _forks.begin()
    try:
        yield
    finally:
        _forks.end()


def step() -> None:
    """Say that this thread holds no lock here: forks that wait for it go on, and it after them."""
    _forks.step()


def _forget() -> None:
    global _forks, _registering
    _forks, _registering = _Forks(), threading.Lock()
