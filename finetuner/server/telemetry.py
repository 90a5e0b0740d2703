"""Prometheus metrics of the gateway and its Executors; docs/operations.md lists them.

`finetuner serve` has every process of a Flow write its figures to a directory of its own, from
which the gateway answers for all of them. An Executor alone shows them on Jina's monitoring port.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from finetuner.encoding.observer import EncodingObserver
from finetuner.server.multiprocess import DIRECTORY_VARIABLE

if TYPE_CHECKING:
    from finetuner.server.calls import Call

# series of models that come and go must not add up for ever
MAX_MODELS = 50
OTHER_MODELS = 'other'
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_CALLS = (1, 2, 4, 8, 16)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class GatewayMetrics:
    """What the gateway measures: requests of both protocols.

    Args:
        others: registries that show them too, such as that of Jina's monitoring port.
    """

    def __init__(self, *others: CollectorRegistry | None) -> None:
        self._registry = CollectorRegistry()
        labels = ('endpoint', 'protocol')
        self._requests = Counter(
            'finetuner_requests', 'Requests answered', (*labels, 'status'), registry=self._registry
        )
        self._documents = Counter(
            'finetuner_documents', 'Documents that came', labels, registry=self._registry
        )
        self._seconds = Histogram(
            'finetuner_request_seconds',
            'From the head of a request to its answer',
            labels,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            'finetuner_requests_in_flight',
            'Requests being answered',
            registry=self._registry,
            multiprocess_mode='livesum',
        )
        self._coalesced = Histogram(
            'finetuner_coalesced_requests',
            'Small requests to /encode that an Executor got in one call',
            buckets=_CALLS,
            registry=self._registry,
        )
        mine = (self._requests, self._documents, self._seconds, self._in_flight, self._coalesced)
        for registry in filter(None, others):
            for metric in mine:
                registry.register(metric)

    def answered(self, call: Call, endpoint: str, seconds: float) -> None:
        """Count a request.

        Args:
            call: that was answered.
            endpoint: it is filed under, one of few.
            seconds: it took.
        """
        self._requests.labels(endpoint, call.protocol, str(call.status)).inc()
        self._seconds.labels(endpoint, call.protocol).observe(seconds)
        if call.num_documents:
            self._documents.labels(endpoint, call.protocol).inc(call.num_documents)

    def called(self, num_requests: int) -> None:
        """Count a call to an Executor.

        Args:
            num_requests: small ones that went in it.
        """
        self._coalesced.observe(num_requests)

    def write(self, in_flight: int) -> bytes:
        """All metrics there are, in Prometheus' text format.

        Args:
            in_flight: requests that are being answered.
        """
        self._in_flight.set(in_flight)
        if DIRECTORY_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        everything = CollectorRegistry()
        MultiProcessCollector(everything)
        return generate_latest(everything)


class PrometheusObserver(EncodingObserver):
    """Turns what happens in an encoder into metrics.

    Args:
        registry: that shows them, None where the gateway reads them from files.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        target = CollectorRegistry() if registry is None else registry
        self._lock = threading.Lock()
        self._labels: OrderedDict[str, None] = OrderedDict()
        self._bytes: dict[str, int] = {}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f'finetuner_{name}', text, labels, registry=target)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f'finetuner_{name}', text, registry=target, multiprocess_mode='livesum')

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f'finetuner_{name}', text, labels, buckets=buckets, registry=target)

        self._queue = gauge('queue_documents', 'Documents that wait to be read or embedded')
        self._read = counter('read_documents', 'Documents decoded or tokenised', 'result')
        self._read_seconds = histogram('read_seconds', 'Reading of contents', _SECONDS)
        self._batch_sizes = histogram('batch_documents', 'Documents of a batch', _BATCHES, 'model')
        self._batch_seconds = histogram(
            'batch_seconds', 'A batch on its way through a model', _SECONDS, 'model'
        )
        self._refused = counter('refused', 'Requests an Executor did not take', 'reason')
        self._loaded = counter('models_loaded', 'Models loaded')
        self._load_seconds = histogram('model_load_seconds', 'Loading of a model', _SECONDS)
        self._dropped = counter('models_dropped', 'Models let go of')
        self._asked = counter('models_asked', 'Models named by requests', 'cache')
        self._models = gauge('models', 'Models in memory')
        self._model_bytes = gauge('model_bytes', 'Memory that models take')

    def queue_changed(self, num_documents: int) -> None:
        """Set the length of the queue."""
        self._queue.set(num_documents)

    def documents_read(self, num_documents: int, num_failed: int, seconds: float) -> None:
        """Count what was read, and what could not be."""
        self._read.labels('ok').inc(num_documents - num_failed)
        self._read.labels('failed').inc(num_failed)
        self._read_seconds.observe(seconds)

    def batch_embedded(self, model: str, num_documents: int, seconds: float) -> None:
        """Count a batch under its model."""
        label = self._label_of(model)
        self._batch_sizes.labels(label).observe(num_documents)
        self._batch_seconds.labels(label).observe(seconds)

    def request_refused(self, reason: str) -> None:
        """Count a refusal."""
        self._refused.labels(reason).inc()

    def model_loaded(self, model: str, seconds: float, num_bytes: int) -> None:
        """Count a model, and what it takes."""
        self._loaded.inc()
        self._load_seconds.observe(seconds)
        self._set_bytes(model, num_bytes)

    def model_dropped(self, model: str) -> None:
        """Count a model that went."""
        self._dropped.inc()
        self._set_bytes(model, None)

    def model_asked(self, model: str, is_loaded: bool) -> None:
        """Count a hit or a miss of the models in memory."""
        self._asked.labels('hit' if is_loaded else 'miss').inc()

    def _set_bytes(self, model: str, num_bytes: int | None) -> None:
        with self._lock:
            if num_bytes is None:
                self._bytes.pop(model, None)
            else:
                self._bytes[model] = num_bytes
            self._models.set(len(self._bytes))
            self._model_bytes.set(sum(self._bytes.values()))

    def _label_of(self, model: str) -> str:
        """The model itself while there is room; the longest unused makes room where it can."""
        with self._lock:
            if model in self._labels:
                self._labels.move_to_end(model)
                return model
            if len(self._labels) >= MAX_MODELS:
                if DIRECTORY_VARIABLE in os.environ:
                    return OTHER_MODELS  # what is in the files cannot be taken out
                oldest, _ = self._labels.popitem(last=False)
                self._batch_sizes.remove(oldest)
                self._batch_seconds.remove(oldest)
            self._labels[model] = None
            return model


def build_observer(runtime_args: Any) -> EncodingObserver:
    """The observer of an Executor.

    Args:
        runtime_args: what Jina handed it: its `metrics_registry` is that of Jina's monitoring port,
            None where a Flow does not say `monitoring: true`.

    Returns:
        One that writes metrics where somebody can read them, else one that does nothing.
    """
    if isinstance(runtime_args, Mapping):
        registry = runtime_args.get('metrics_registry')
    else:
        registry = getattr(runtime_args, 'metrics_registry', None)
    if registry is None and DIRECTORY_VARIABLE not in os.environ:
        return EncodingObserver()
    return PrometheusObserver(registry)
