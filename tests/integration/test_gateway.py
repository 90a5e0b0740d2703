"""The gateway before real Executors: errors, JSON, tokens, addresses."""

import subprocess
import sys

import httpx
import pytest
from docarray import Document, DocumentArray
from jina.excepts import BadServer, BadServerFlow

from tests.integration.serving import REPOSITORY, Server, flow_on_free_ports, serve

TOKEN = 'a token of the tests'
FLOW = f"""
jtype: Flow
with:
  host: 127.0.0.1
  retries: 0
gateway:
  uses: finetuner.server.gateway.Gateway
  protocol: [grpc, http]
  port: [0, 0]
executors:
  - name: troublesome
    uses: Troublesome
    py_modules: {REPOSITORY}/tests/integration/troublesome.py
"""


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    with serve(FLOW, tmp_path_factory.mktemp('open'), FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture(scope='module')
def guarded(tmp_path_factory):
    with serve(FLOW, tmp_path_factory.mktemp('guarded'), FINETUNER_TOKEN=TOKEN) as running:
        yield running


def assert_clean(text: str) -> None:
    for leak in ('Traceback', '/secret', 'site-packages', '.py', 'line '):
        assert leak not in text


def test_an_unknown_endpoint_is_404_and_lists_the_known(server: Server):
    for answer in (
        server.post('/ecko', {'data': [{'text': 'a'}]}),
        server.post('/post', {'exec_endpoint': '/ecko', 'data': [{'text': 'a'}]}),
    ):
        assert answer.status_code == 404
        assert answer.json()['error'] == 'NotFoundError'
        assert "did you mean '/echo'" in answer.json()['message']
        assert '/break, /echo, /refuse' in answer.json()['message']


def test_an_unknown_endpoint_is_an_error_over_grpc(server: Server):
    with pytest.raises(BadServer, match=r"did you mean \\?'/echo") as caught:
        server.client().post('/ecko', DocumentArray([Document(text='a')]))
    assert caught.value.args[0].status.exception.name == 'NotFoundError'


def test_a_target_that_lacks_the_endpoint_is_no_pass_through(server: Server):
    body = {'exec_endpoint': '/echo', 'target_executor': 'nobody', 'data': [{'text': 'a'}]}
    assert server.post('/post', body).status_code == 404
    assert server.post('/post', {**body, 'target_executor': 'trouble'}).status_code == 200
    for pattern in ('(', 'a{99999999999999999999}', '(' * 2000 + ')' * 2000):
        assert server.post('/post', {**body, 'target_executor': pattern}).status_code == 404


def test_errors_on_purpose_reach_the_client_without_stacks(server: Server):
    answer = server.post('/refuse', {'data': [{'text': 'a'}]})
    assert answer.status_code == 422
    assert answer.json() == {'error': 'DataError', 'message': 'document 3 is empty'}
    with pytest.raises(BadServer, match='document 3 is empty') as caught:
        server.client().post('/refuse', DocumentArray([Document(text='a')]))
    assert_clean(str(caught.value))
    with pytest.raises(ValueError, match='document 3 is empty'):
        server.client('http').post('/refuse', DocumentArray([Document(text='a')]))


def test_errors_nobody_foresaw_say_nothing_but_where_the_log_is(server: Server):
    answer = server.post('/break', {'data': [{'text': 'a'}]})
    assert answer.status_code == 500
    assert answer.json()['error'] == 'InternalError'
    assert_clean(answer.text)
    request_id = answer.json()['message'].rpartition(' ')[2]
    written = ''.join(server.log.read_text().split())
    assert request_id in written
    assert 'cannotopen/secret/place' in written
    with pytest.raises(BadServer, match='InternalError') as caught:
        server.client().post('/break', DocumentArray([Document(text='a')]))
    assert_clean(str(caught.value))


def test_json_numbers_and_bytes_arrive_as_they_were_sent(server: Server):
    documents = [
        {'text': 'none', 'tags': {'finetuner_label': 0}},
        {'text': 'one', 'tags': {'finetuner_label': 1}},
        {'blob': 'AAECA/8=\n', 'tags': {'yes': True, 'deep': {'list': [1, 'a', None]}}},
        {'tensor': [[0, 255], [1, 2]]},
        {'text': 'root', 'chunks': [{'text': 'part'}]},
    ]
    answer = server.post('/echo', {'data': documents})
    assert answer.status_code == 200
    data = answer.json()['data']
    assert [doc['tags']['finetuner_label'] for doc in data[:2]] == [0, 1]
    assert not any(isinstance(doc['tags']['finetuner_label'], bool) for doc in data[:2])
    assert data[2]['blob'] == 'AAECA/8='
    assert data[2]['tags'] == {'yes': True, 'deep': {'list': [1, 'a', None]}}
    assert data[3]['tensor'] == [[0, 255], [1, 2]]
    assert data[4]['chunks'][0]['text'] == 'part'


def test_jinas_http_client_gets_its_documents_back(server: Server):
    docs = DocumentArray([Document(blob=b'\x00\xff', tags={'n': 2}), Document(text='b')])
    answer = server.client('http').post('/echo', docs)
    assert answer[:, 'id'] == docs[:, 'id']
    assert answer[0].blob == b'\x00\xff'
    assert answer[0].tags['n'] == 2
    assert server.client('http').is_flow_ready()
    assert server.client().is_flow_ready()


@pytest.mark.parametrize(
    ('body', 'words'),
    [
        ({'data': [{'content': 'a'}]}, "document 0: unknown field 'content'"),
        ({'data': [{'text': 'a'}, {'blob': 'a-_b'}]}, 'document 1: blob is not base64'),
        ({'data': [{'blob': 5}]}, 'document 0: blob is not a text'),
        ({'data': [{'text': 5}]}, "document 0: 'text' is '5', of a wrong type"),
        ({'data': [{'tensor': [[1], [1, 2]]}]}, "document 0: 'tensor' is ragged"),
        ({'data': ['a']}, 'document 0 is not a JSON object'),
        ({'data': 'a'}, '`data` is not a list'),
        ({'docs': []}, "unknown key of the body 'docs'"),
        ({'data': [], 'parameters': [1]}, '`parameters` is not a JSON object'),
        ({'data': [{'chunks': [{'blob': '?'}]}]}, 'document 0.chunks[0]: blob is not base64'),
    ],
)
def test_a_wrong_body_is_422_and_says_where(server: Server, body, words):
    answer = server.post('/echo', body)
    assert answer.status_code == 422
    assert words in answer.json()['message']


def test_what_is_not_json_is_refused(server: Server):
    # a form or plain text is what a page of another origin can post without being asked
    for kind in ('text/plain', 'application/x-www-form-urlencoded', None):
        headers = {'content-type': kind} if kind else {}
        answer = httpx.post(f'{server.url}/echo', content=b'{"data": []}', headers=headers)
        assert answer.status_code == 422
        assert 'Content-Type: application/json' in answer.json()['message']
    broken = httpx.post(
        f'{server.url}/echo', content=b'{', headers={'content-type': 'application/json'}
    )
    assert broken.status_code == 422
    assert 'not JSON' in broken.json()['message']


def test_pages(server: Server):
    assert httpx.get(server.url).json()['endpoints'] == ['/break', '/echo', '/refuse']
    assert httpx.get(f'{server.url}/docs').status_code == 200
    paths = httpx.get(f'{server.url}/openapi.json').json()['paths']
    ours = {path for path in paths if path.startswith('/api/v1/')}
    assert set(paths) - ours == {'/break', '/echo', '/refuse', '/post'}
    assert '/api/v1/runs' in ours
    assert httpx.get(f'{server.url}/echo').status_code == 404


def test_the_token_is_asked_for_over_http(guarded: Server):
    body = {'data': [{'text': 'a'}]}
    for headers in ({}, {'Authorization': 'Bearer no'}, {'Authorization': TOKEN}):
        for path in ('/echo', '/post', '/nowhere'):
            answer = guarded.post(path, {**body, 'exec_endpoint': '/echo'}, headers=headers)
            assert answer.status_code == 401
            assert 'Authorization: Bearer' in answer.json()['message']
    allowed = {'Authorization': f'Bearer {TOKEN}'}
    assert guarded.post('/echo', body, headers=allowed).status_code == 200
    assert httpx.get(guarded.url).status_code == 200
    assert httpx.get(f'{guarded.url}/metrics').status_code == 401


def test_the_token_is_asked_for_over_grpc(guarded: Server):
    docs = DocumentArray([Document(text='a')])
    client = guarded.client()
    for options in ({}, {'metadata': (('authorization', 'Bearer no'),)}, {'stream': False}):
        with pytest.raises(BadServerFlow, match='this server wants a token'):
            client.post('/echo', docs, **options)
    allowed = {'metadata': (('authorization', f'Bearer {TOKEN}'),)}
    assert client.post('/echo', docs, **allowed)[0].text == 'a'
    assert client.post('/echo', docs, stream=False, **allowed)[0].text == 'a'
    assert client.is_flow_ready()


def test_an_open_address_without_a_token_does_not_start(tmp_path):
    path, *_ = flow_on_free_ports(FLOW.replace('127.0.0.1', '0.0.0.0'), tmp_path)
    command = [sys.executable, '-m', 'finetuner.cli', 'serve', str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert ended.returncode == 2
    assert 'FINETUNER_TOKEN' in ended.stderr
    assert '127.0.0.1' in ended.stderr
    assert 'Traceback' not in ended.stderr
