"""Spans of a running Flow, received by a collector, and metrics on Jina's own port."""

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.integration.operating import flow, texts
from tests.integration.serving import free_ports, serve

PARENT = '0af7651916cd43dd8448eb211c80319c'


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list = []

    def Export(self, request, context):
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture(scope='module')
def observed(tmp_path_factory):
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port('127.0.0.1:0')
    server.start()
    (executors,) = free_ports(1)
    more = (
        f'  tracing: true\n  traces_exporter_host: http://127.0.0.1\n'
        f'  traces_exporter_port: {port}\n'
    )
    source = flow(more=more).replace(
        'uses: Busy', f'uses: Busy\n    monitoring: true\n    port_monitoring: {executors}'
    )
    variables = {'FINETUNER_TOKEN': '', 'OTEL_BSP_SCHEDULE_DELAY': '200'}
    with serve(source, tmp_path_factory.mktemp('observed'), **variables) as running:
        yield running, collector, executors
    server.stop(None)


def attributes(span) -> dict:
    return {
        each.key: getattr(each.value, each.value.WhichOneof('value')) for each in span.attributes
    }


def wait_for(collector: Collector, request_id: str):
    for _ in range(150):
        for span in list(collector.spans):
            if attributes(span).get('request_id') == request_id:
                family = [one for one in collector.spans if one.trace_id == span.trace_id]
                if any(one.name == 'embed' for one in family):
                    return span, family
        time.sleep(0.2)
    raise AssertionError([span.name for span in collector.spans])


def test_spans_lead_from_the_client_through_the_gateway_to_the_stages(observed):
    server, collector, _ = observed
    headers = {'X-Request-Id': 'traced-1', 'traceparent': f'00-{PARENT}-b7ad6b7169203331-01'}
    body = {'data': [{'text': 'a'}] * 3}
    assert server.post('/encode', body, headers=headers).status_code == 200
    span, family = wait_for(collector, 'traced-1')
    assert span.trace_id.hex() == PARENT
    assert span.parent_span_id.hex() == 'b7ad6b7169203331'
    assert span.name == 'gateway /encode'
    told = attributes(span)
    assert (told['endpoint'], told['protocol']) == ('/encode', 'http')
    assert (told['num_documents'], told['status']) == (3, 200)
    by_id = {one.span_id: one for one in family}
    stage = next(one for one in family if one.name == 'embed')
    assert attributes(stage)['num_documents'] == 3
    names = []
    while stage is not None:
        names.append(stage.name)
        stage = by_id.get(stage.parent_span_id)
    assert names[0] == 'embed'
    assert names[-1] == 'gateway /encode'


def test_requests_over_grpc_are_traced(observed):
    server, collector, _ = observed
    metadata = (('x-request-id', 'traced-2'),)
    assert len(server.client().post('/encode', texts(2), metadata=metadata)) == 2
    span, _ = wait_for(collector, 'traced-2')
    assert (attributes(span)['protocol'], attributes(span)['status']) == ('grpc', 200)


def test_jinas_monitoring_port_shows_the_metrics_of_an_executor(observed):
    server, _, port = observed
    server.client().post('/encode', texts(2))
    written = httpx.get(f'http://127.0.0.1:{port}/metrics').text
    assert 'finetuner_batch_documents_count{model="first"}' in written
    assert 'finetuner_model_bytes 1000.0' in written
    assert 'jina_' in written
