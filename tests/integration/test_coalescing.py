"""Many small requests at the same time to one encoder: sent on together, answered each by itself."""

import asyncio
import base64
import io
import re
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from docarray import Document, DocumentArray
from jina.types.request.data import DataRequest
from PIL import Image

from finetuner.artifact import save_artifact
from finetuner.inference import load_engine
from finetuner.server.coalescing import ENDPOINT
from tests.integration.serving import REPOSITORY, Server, serve
from tests.unit.tiny_artifacts import assert_same_vectors, make_model, make_spec, pictures

METHOD = '/jina.JinaSingleDataRequestRPC/process_single_data'
NUM_REQUESTS = 120
BROKEN = range(3, NUM_REQUESTS, 7)
NORMALIZED = range(0, NUM_REQUESTS, 5)
PAIRS = range(2, NUM_REQUESTS, 9)


@pytest.fixture(scope='module')
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp('artifact') / 'tiny'
    save_artifact(folder, make_model(), make_spec(), onnx_inputs=pictures(), onnx_required=True)
    return folder


@pytest.fixture(scope='module')
def server(artifact, tmp_path_factory) -> Iterator[Server]:
    flow = (REPOSITORY / 'flows' / 'encode.yml').read_text()
    text = re.sub('artifact: .*', f'artifact: {artifact}\n      is_onnx: true', flow)
    assert text != flow
    with serve(text, tmp_path_factory.mktemp('server'), FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture(scope='module')
def blobs() -> list[bytes]:
    found = []
    for number, picture in enumerate(pictures(NUM_REQUESTS, seed=5)):
        file = io.BytesIO()
        Image.fromarray(picture).resize((20 + number % 30, 40)).save(file, 'PNG')
        found.append(b'no picture' if number in BROKEN else file.getvalue())
    return found


@pytest.fixture(scope='module')
def expected(artifact, blobs) -> np.ndarray:
    engine = load_engine(artifact, is_onnx=True)
    docs = DocumentArray([Document(blob=blob) for blob in blobs])
    failed = engine.encode_documents(docs)
    assert [position for position, _ in failed] == list(BROKEN)
    width = engine.dimension
    return np.array([np.zeros(width) if d.embedding is None else d.embedding for d in docs])


def asked_of(number: int, blobs: list[bytes]) -> tuple[list[bytes], dict[str, Any]]:
    """Contents and parameters of a request; some have two Documents."""
    chosen = [blobs[number], blobs[0]] if number in PAIRS else [blobs[number]]
    return chosen, {'normalize': True} if number in NORMALIZED else {}


async def over_grpc(server: Server, blobs: list[bytes]) -> list[tuple[int, list[Any]]]:
    """For each request its status, and its Documents as id, embedding and tags."""
    async with grpc.aio.insecure_channel(f'127.0.0.1:{server.grpc_port}') as channel:
        call = channel.unary_unary(METHOD)

        async def one(number: int) -> tuple[int, list[Any]]:
            chosen, parameters = asked_of(number, blobs)
            request = DataRequest()
            request.header.exec_endpoint = '/encode'
            request.parameters = parameters
            request.data.docs = DocumentArray(
                [Document(id=f'{number}-{i}', blob=each) for i, each in enumerate(chosen)]
            )
            answer = DataRequest(await call(request.proto.SerializeToString()))
            assert answer.header.request_id == request.header.request_id
            assert not [
                name
                for name in answer.parameters
                if name.startswith('__') and name != '__results__'
            ]
            if answer.header.status.code:
                return 422, [answer.header.status.description]
            return 200, [(doc.id, doc.embedding, doc.tags) for doc in answer.docs]

        return await asyncio.gather(*map(one, range(NUM_REQUESTS)))


async def over_http(server: Server, blobs: list[bytes]) -> list[tuple[int, list[Any]]]:
    async with httpx.AsyncClient(timeout=60) as client:

        async def one(number: int) -> tuple[int, list[Any]]:
            chosen, parameters = asked_of(number, blobs)
            data = [
                {'id': f'{number}-{i}', 'blob': base64.b64encode(each).decode()}
                for i, each in enumerate(chosen)
            ]
            answer = await client.post(
                f'{server.url}/encode', json={'data': data, 'parameters': parameters}
            )
            if answer.status_code != 200:
                return answer.status_code, [answer.json()['message']]
            docs = answer.json()['data']
            return 200, [(doc['id'], doc.get('embedding'), doc.get('tags', {})) for doc in docs]

        return await asyncio.gather(*map(one, range(NUM_REQUESTS)))


def calls_and_requests(server: Server) -> tuple[float, float]:
    text = httpx.get(f'{server.url}/metrics').text
    found = [
        float(re.search(rf'^finetuner_coalesced_requests_{name} (\S+)$', text, re.M).group(1))
        for name in ('count', 'sum')
    ]
    return found[0], found[1]


@pytest.mark.parametrize('ask', [over_grpc, over_http])
def test_each_of_many_gets_its_own_answer(server, blobs, expected, ask):
    calls, requests = calls_and_requests(server)
    answers = asyncio.run(ask(server, blobs))
    for number, (status, docs) in enumerate(answers):
        if number in BROKEN and number not in PAIRS:
            assert status == 422
            assert '1 of the Documents cannot be encoded: Document 0' in docs[0]
            continue
        assert status == 200
        rows = [number, 0] if number in PAIRS else [number]
        assert [doc[0] for doc in docs] == [f'{number}-{i}' for i in range(len(rows))]
        for row, (_, embedding, tags) in zip(rows, docs, strict=True):
            if row in BROKEN:
                assert embedding is None
                assert 'Document 0' in tags['finetuner_error']
                continue
            wanted = expected[row]
            if number in NORMALIZED:
                wanted = wanted / np.linalg.norm(wanted)
            assert_same_vectors(np.array([embedding]), wanted[None], 1e-4)
            assert tags == {}
    more_calls, more_requests = calls_and_requests(server)
    assert more_requests - requests == NUM_REQUESTS
    assert more_calls - calls < NUM_REQUESTS / 2


def test_a_client_cannot_ask_in_parts(server, blobs):
    blob = base64.b64encode(blobs[0]).decode()
    body = {'data': [{'blob': blob}], 'parameters': {'__parts': [[1, 5]]}}
    answer = server.post('/post', {**body, 'exec_endpoint': ENDPOINT})
    assert answer.status_code == 404
    assert ENDPOINT not in answer.json()['message'].partition('allowed')[2]
    assert server.post(ENDPOINT, body).status_code == 404
    # and of those of its own nothing is left
    answer = server.post('/encode', body)
    assert answer.status_code == 200
    assert '__parts' not in answer.json()['parameters']
    request = DataRequest()
    request.header.exec_endpoint = ENDPOINT
    request.parameters = body['parameters']
    with grpc.insecure_channel(f'127.0.0.1:{server.grpc_port}') as channel:
        raw = channel.unary_unary(METHOD)(request.proto.SerializeToString())
    assert DataRequest(raw).header.status.exception.name == 'NotFoundError'
