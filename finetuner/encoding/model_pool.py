"""The models of a service: loaded when they are asked for, within a limit of memory, and swapped.

A request holds the model that it began with until it ends, so a swap changes nothing under it. The
new model has answered once before the first request gets it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from finetuner.encoding.observer import EncodingObserver
from finetuner.engines import InferenceEngine
from finetuner.excepts import FinetunerError, NotFoundError, TooLargeError

logger = logging.getLogger(__name__)

_MEGABYTE = 2**20
# names whose meaning may change are remembered for so many askers
_MOST_NAMES = 1_000
# seconds until a model that could not be loaded is tried again; each time they double
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 300.0


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        key: what it is, whatever it was called: an artifact id, a path or a backbone's name.
        engine: what embeds.
        num_bytes: what it takes of memory.
    """

    key: str
    engine: InferenceEngine
    num_bytes: int


@dataclass
class _Name:
    """What a name stood for when it was last looked up."""

    key: str


@dataclass
class _Failure:
    """A model that a name moved to and that could not be loaded."""

    pause: float
    until: float


class ModelPool:
    """Models by name.

    Args:
        default: name of the model for requests that name none; it is never let go of.
        resolve: the key that a name stands for to an owner (None: whoever started the service);
            raises NotFoundError where there is none.
        load: loads the model of a key.
        may_move: whether what a name stands for can change.
        memory_mb: of all models together.
        poll_seconds: how often names that may move are looked up again.
        observer: hears what happens.

    Raises:
        FinetunerError: the default cannot be loaded. One that may move and stands for nothing yet
            is waited for: see `is_ready`.
    """

    def __init__(
        self,
        default: str,
        resolve: Callable[[str, str | None], str],
        load: Callable[[str], InferenceEngine],
        may_move: Callable[[str], bool] = lambda name: False,
        memory_mb: float | None = None,
        poll_seconds: float = 1.0,
        observer: EncodingObserver | None = None,
    ) -> None:
        self.default = default
        self._resolve = resolve
        self._load = load
        self._may_move = may_move
        self._limit = None if memory_mb is None else int(memory_mb * _MEGABYTE)
        self._poll_seconds = poll_seconds
        self._observer = observer or EncodingObserver()
        self._lock = threading.Lock()
        self._load_lock = threading.Lock()
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        self._loading: dict[str, Future[LoadedModel]] = {}
        self._names: OrderedDict[tuple[str, str | None], _Name] = OrderedDict()
        self._failures: dict[str, _Failure] = {}
        self._default_key = self._next_default_key = ''
        self._reason = f'{default} is not loaded yet'
        self._ending = threading.Event()
        try:
            self._default_key = self._load_once(resolve(default, None)).key
        except NotFoundError as error:
            if not may_move(default):
                raise
            logger.warning('%s: waiting for it', error)
            self._reason = str(error)
        self._watcher = threading.Thread(target=self._watch, name='watch-names', daemon=True)
        self._watcher.start()

    @property
    def is_ready(self) -> bool:
        """Whether the default model has answered once."""
        return bool(self._default_key)

    @property
    def reason(self) -> str:
        """Why it is not ready; '' where it is."""
        return '' if self.is_ready else self._reason

    @property
    def loaded(self) -> list[LoadedModel]:
        """What is in memory, the least recently used first."""
        with self._lock:
            return list(self._loaded.values())

    def get_default(self) -> LoadedModel:
        """The model for requests that name none; never waits.

        Raises:
            NotFoundError: it stands for nothing yet.
        """
        with self._lock:
            if not self._default_key:
                raise NotFoundError(self._reason)
            self._loaded.move_to_end(self._default_key)
            return self._loaded[self._default_key]

    def get(self, name: str, owner: str | None = None) -> LoadedModel:
        """A model by its name, loaded when it is not in memory.

        Args:
            name: an artifact id, an alias, a backbone's name.
            owner: who asks; a name means what it means to them.

        Raises:
            NotFoundError: the name stands for nothing that they may use.
            TooLargeError: it takes more memory than all models together may.
            FinetunerError: it cannot be loaded.
        """
        key, found = self.find(name, owner)
        return found or self.load(key)

    def find(self, name: str, owner: str | None = None) -> tuple[str, LoadedModel | None]:
        """What a name stands for, and the model if it is in memory; waits for no model.

        Args:
            name: see `get`.
            owner: see `get`.

        Raises:
            NotFoundError: the name stands for nothing that they may use.
        """
        if name == self.default and owner is None:
            model = self.get_default()
            return model.key, model
        key = self._key_of(name, owner)
        with self._lock:
            found = self._loaded.get(key)
            if found is not None:
                self._loaded.move_to_end(key)
        self._observer.model_asked(key, found is not None)
        return key, found

    def load(self, key: str) -> LoadedModel:
        """The model of a key, which may take its time.

        Args:
            key: that `find` gave.

        Raises:
            TooLargeError: it takes more memory than there is beside the default.
            FinetunerError: it cannot be loaded.
        """
        return self._load_once(key)

    def close(self) -> None:
        """End the thread that looks names up; models go when their last request ends."""
        self._ending.set()
        self._watcher.join()

    def _key_of(self, name: str, owner: str | None) -> str:
        if not self._may_move(name):
            # asked each time: what is loaded for one is not there for another
            return self._resolve(name, owner)
        with self._lock:
            known = self._names.get((name, owner))
            if known is not None:
                self._names.move_to_end((name, owner))
                return known.key
        key = self._resolve(name, owner)
        with self._lock:
            self._names[name, owner] = _Name(key)
            while len(self._names) > _MOST_NAMES:
                self._names.popitem(last=False)
        return key

    def _load_once(self, key: str, is_default: bool = False) -> LoadedModel:
        """Load a model, once however many ask for it at the same time."""
        with self._lock:
            if key in self._loaded:
                return self._loaded[key]
            loading = self._loading.get(key)
            if loading is None:
                mine = self._loading[key] = Future()
        if loading is not None:
            return loading.result()
        try:
            # one after the other: their memory is not needed all at once, and can be told apart
            with self._load_lock:
                model = self._load_now(key, is_default)
        except BaseException as error:
            with self._lock:
                del self._loading[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._loading[key]
            self._loaded[key] = model
            dropped = self._drop_least_used(key)
        mine.set_result(model)
        self._let_go(dropped)
        return model

    def _load_now(self, key: str, is_default: bool) -> LoadedModel:
        started = time.monotonic()
        before = _resident_bytes()
        engine = self._load(key)
        engine.warm_up()
        # what it takes beside its weights cannot be asked for; other requests make this inexact
        num_bytes = max(engine.num_bytes, _resident_bytes() - before)
        if self._limit is not None and self._default_key:
            with self._lock:
                default = self._loaded.get(self._default_key)
            # the default stays, unless this one takes its place
            held = default.num_bytes if default is not None and not is_default else 0
            if held + num_bytes > self._limit:
                raise TooLargeError(
                    f'the model {key} takes {num_bytes / _MEGABYTE:,.0f} MB, and all models of this '
                    f'service may take {self._limit / _MEGABYTE:,.0f} MB, of which the default has '
                    f'{held / _MEGABYTE:,.0f} MB: start it with a larger model_memory_mb'
                )
        self._observer.model_loaded(key, time.monotonic() - started, num_bytes)
        return LoadedModel(key, engine, num_bytes)

    def _drop_least_used(self, newest: str) -> list[LoadedModel]:
        dropped: list[LoadedModel] = []
        if self._limit is None:
            return dropped
        for key in list(self._loaded):
            if sum(model.num_bytes for model in self._loaded.values()) <= self._limit:
                break
            if key not in (newest, self._default_key, self._next_default_key):
                dropped.append(self._loaded.pop(key))
        return dropped

    def _let_go(self, dropped: list[LoadedModel]) -> None:
        for model in dropped:
            self._observer.model_dropped(model.key)
        if dropped:
            dropped.clear()
            _return_memory()

    # names that move

    def _watch(self) -> None:
        while not self._ending.wait(self._poll_seconds):
            with self._lock:
                names = dict(self._names)
            for (name, owner), known in names.items():
                self._look_again(name, owner, known)
            if self._may_move(self.default):
                self._look_at_default()

    def _look_again(self, name: str, owner: str | None, known: _Name) -> None:
        try:
            key = self._resolve(name, owner)
            if key != known.key and not self._rests(key):
                # requests go on with the old one as long as this takes
                self._try_to_load(key)
                before, known.key = known.key, key
                self._forget(before)
        except NotFoundError:
            with self._lock:
                self._names.pop((name, owner), None)
        except FinetunerError as error:
            logger.error('%s stays what it was: %s', name, error)
        except Exception:
            # a database that is away, no memory: what comes next is looked at all the same
            logger.exception('%s stays what it was', name)

    def _look_at_default(self) -> None:
        try:
            key = self._resolve(self.default, None)
            if key != self._default_key and not self._rests(key):
                # from now on it is not dropped for others that are loaded meanwhile
                self._next_default_key = key
                self._try_to_load(key, is_default=True)
                with self._lock:
                    before, self._default_key = self._default_key, key
                self._forget(before)
                logger.info('%s is %s now', self.default, key)
        except FinetunerError as error:
            if not self._default_key:
                self._reason = str(error)
            elif not isinstance(error, NotFoundError):
                logger.error('%s stays what it was: %s', self.default, error)
        except Exception as error:
            logger.exception('%s stays what it was', self.default)
            if not self._default_key:
                self._reason = f'{self.default} cannot be loaded: {type(error).__name__}'

    def _rests(self, key: str) -> bool:
        """Whether a model could not be loaded, and it is too soon to try again."""
        failure = self._failures.get(key)
        return failure is not None and time.monotonic() < failure.until

    def _try_to_load(self, key: str, is_default: bool = False) -> None:
        try:
            self._load_once(key, is_default)
        except BaseException:
            now = time.monotonic()
            known = self._failures.get(key)
            pause = min(known.pause * 2, _LONGEST_PAUSE) if known else _FIRST_PAUSE
            # those that no name stands for any more are not tried, and forgotten
            self._failures = {
                other: failure
                for other, failure in self._failures.items()
                if now < failure.until + _LONGEST_PAUSE
            }
            self._failures[key] = _Failure(pause, now + pause)
            raise
        self._failures.pop(key, None)

    def _forget(self, key: str) -> None:
        """Let go of what a name stood for, unless another one does still."""
        with self._lock:
            named = {known.key for known in self._names.values()}
            if not key or key == self._default_key or key in named:
                return
            dropped = [self._loaded.pop(key)] if key in self._loaded else []
        self._let_go(dropped)


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _return_memory() -> None:
    """Give the system back what a model took, which malloc would keep for the next one."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL('libc.so.6').malloc_trim(0)
