"""Metrics: what an encoder tells becomes figures, with few series whatever models come."""

from types import SimpleNamespace

from prometheus_client import CollectorRegistry, generate_latest

from finetuner.encoding.observer import EncodingObserver
from finetuner.server.calls import Call
from finetuner.server.multiprocess import DIRECTORY_VARIABLE
from finetuner.server.telemetry import (
    MAX_MODELS,
    GatewayMetrics,
    PrometheusObserver,
    build_observer,
)


def values(registry: CollectorRegistry) -> dict[str, float]:
    return {
        sample.name + ''.join(f',{value}' for value in sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_what_an_encoder_tells_is_measured():
    registry = CollectorRegistry()
    observer = build_observer(SimpleNamespace(metrics_registry=registry))
    observer.queue_changed(7)
    observer.documents_read(5, 2, 0.1)
    observer.batch_embedded('m', 3, 0.02)
    observer.request_refused('queue')
    observer.model_asked('m', False)
    observer.model_loaded('m', 1.5, 100)
    observer.model_loaded('n', 1.5, 50)
    observer.model_dropped('m')
    found = values(registry)
    assert found['finetuner_queue_documents'] == 7
    assert found['finetuner_read_documents_total,ok'] == 3
    assert found['finetuner_read_documents_total,failed'] == 2
    assert found['finetuner_batch_documents_sum,m'] == 3
    assert found['finetuner_refused_total,queue'] == 1
    assert found['finetuner_models_asked_total,miss'] == 1
    assert found['finetuner_models'] == 1
    assert found['finetuner_model_bytes'] == 50
    assert found['finetuner_models_loaded_total'] == 2
    assert found['finetuner_models_dropped_total'] == 1


def test_series_of_models_do_not_add_up():
    registry = CollectorRegistry()
    observer = PrometheusObserver(registry)
    for i in range(3 * MAX_MODELS):
        observer.batch_embedded('kept', 1, 0.1)
        observer.batch_embedded(f'm{i}', 1, 0.1)
    models = [name for name in values(registry) if name.startswith('finetuner_batch_seconds_count')]
    assert len(models) == MAX_MODELS
    assert 'finetuner_batch_seconds_count,kept' in models
    assert f'finetuner_batch_seconds_count,m{3 * MAX_MODELS - 1}' in models


def test_nothing_is_measured_where_nobody_can_read_it(monkeypatch):
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    for arguments in (SimpleNamespace(metrics_registry=None), {}, None):
        assert type(build_observer(arguments)) is EncodingObserver


def test_a_gateway_counts_requests_by_endpoint_protocol_and_status(monkeypatch):
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    jinas = CollectorRegistry()
    metrics = GatewayMetrics(jinas, None)
    metrics.answered(Call('http', 'a', num_documents=3), '/encode', 0.2)
    metrics.answered(Call('grpc', 'b', status=429), '/encode', 0.1)
    written = metrics.write(in_flight=2).decode()
    assert (
        'finetuner_requests_total{endpoint="/encode",protocol="grpc",status="429"} 1.0' in written
    )
    assert 'finetuner_documents_total{endpoint="/encode",protocol="http"} 3.0' in written
    assert 'finetuner_requests_in_flight 2.0' in written
    assert generate_latest(jinas).decode() == written
