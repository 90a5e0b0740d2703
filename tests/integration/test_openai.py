"""OpenAI's own client asks this server for embeddings."""

import base64
import io

import httpx
import numpy as np
import openai
import pytest
from docarray import Document, DocumentArray
from PIL import Image

from tests.integration.operating import flow
from tests.integration.serving import REPOSITORY, Server, serve

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
  uses_with: {{runs: false}}
executors:
  - name: encoder
    uses: {REPOSITORY}/executors/encoder/config.yml
    uses_with:
      artifact: efficientnet-lite0
"""


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    with serve(FLOW, tmp_path_factory.mktemp('openai'), FINETUNER_TOKEN=TOKEN) as running:
        yield running


@pytest.fixture(scope='module')
def client(server):
    base = f'{server.url}/v1'
    with openai.OpenAI(base_url=base, api_key=TOKEN, max_retries=0, timeout=120) as made:
        yield made


def picture(red: int) -> bytes:
    file = io.BytesIO()
    pixels = np.zeros((40, 40, 3), dtype='uint8')
    pixels[:20, :, 0] = red
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


def data_url(content: bytes) -> str:
    return f'data:image/png;base64,{base64.b64encode(content).decode()}'


def encoded(server: Server, contents: list[bytes]) -> np.ndarray:
    docs = DocumentArray([Document(blob=content) for content in contents])
    metadata = (('authorization', f'Bearer {TOKEN}'),)
    return server.client().post('/encode', docs, metadata=metadata).embeddings


def test_both_formats_hold_what_encode_answers(server, client):
    contents = [picture(200), picture(90)]
    wanted = encoded(server, contents)
    inputs = [data_url(content) for content in contents]
    # the client itself asks for base64 unless told otherwise, and decodes it
    decoded = client.embeddings.create(model='default', input=inputs)
    floats = client.embeddings.create(model='default', input=inputs, encoding_format='float')
    for answer in (decoded, floats):
        assert answer.object == 'list'
        assert [item.index for item in answer.data] == [0, 1]
        vectors = np.array([item.embedding for item in answer.data], dtype='float32')
        np.testing.assert_allclose(vectors, wanted, atol=1e-6)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens
    raw = httpx.post(
        f'{server.url}/v1/embeddings',
        json={'input': inputs, 'encoding_format': 'base64'},
        headers={'Authorization': f'Bearer {TOKEN}'},
        timeout=60,
    ).json()
    vectors = [np.frombuffer(base64.b64decode(each['embedding']), '<f4') for each in raw['data']]
    np.testing.assert_allclose(np.stack(vectors), wanted, atol=1e-6)


def test_pictures_as_other_servers_take_them(server, client):
    wanted = encoded(server, [picture(200)])
    url = data_url(picture(200))
    parts = [
        {'type': 'image_url', 'image_url': {'url': url}},
        {'type': 'image_url', 'image_url': url},
        {'image': url},
        {'image': base64.b64encode(picture(200)).decode()},
    ]
    answer = client.embeddings.create(model='efficientnet-lite0', input=parts)
    for item in answer.data:
        np.testing.assert_allclose([item.embedding], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ('given', 'words', 'param'),
    [
        ({'input': [[1, 2, 3]]}, 'token ids', None),
        ({'input': [1, 2, 3]}, 'token ids', None),
        ({'input': []}, 'empty list', None),
        ({'input': [{'image': 'http://169.254.169.254/latest'}]}, 'input 0 is an address', None),
        ({'input': [{'image': 'data:text/plain;base64,AA'}]}, 'input 0 is a data URL', None),
        ({'input': ['data:image/png;base64,?']}, 'input 0 is not base64', None),
        ({'input': 'a', 'dimensions': 0}, '`dimensions`', None),
        ({'input': 'a', 'encoding_format': 'int8'}, 'encoding_format', None),
        ({'input': 'a', 'extra_body': {'truncate': True}}, "key of the body 'truncate'", None),
    ],
)
def test_what_cannot_be_taken_is_400_in_openais_shape(client, given, words, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model='default', **given)
    assert words in caught.value.message
    assert caught.value.type == 'invalid_request_error'
    assert caught.value.param == param


def test_one_bad_input_fails_the_whole_and_is_named(client):
    inputs = [data_url(picture(200)), data_url(b'no picture'), data_url(picture(90))]
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model='default', input=inputs)
    assert 'input 1' in caught.value.message
    assert caught.value.param == 'input'


def test_an_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model='text-embedding-3-small', input='a')
    assert caught.value.code == 'model_not_found'
    assert caught.value.param == 'model'


def test_the_key_is_the_token(server):
    base = f'{server.url}/v1'
    stranger = openai.OpenAI(base_url=base, api_key='no', max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        stranger.embeddings.create(model='default', input='a')
    assert caught.value.code == 'invalid_api_key'


def test_models_are_listed(client):
    names = [model.id for model in client.models.list()]
    assert names == ['default', 'efficientnet-lite0']
    assert client.models.retrieve('efficientnet-lite0').object == 'model'
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve('nobody')


def test_a_busy_server_says_when_to_come_again(tmp_path):
    source = flow({'max_documents': 2, 'request_seconds': 0.5})
    with serve(source, tmp_path, FINETUNER_TOKEN='') as server:
        client = openai.OpenAI(base_url=f'{server.url}/v1', api_key='any', max_retries=0)
        answer = client.embeddings.create(model='default', input=['a', 'b'])
        assert len(answer.data) == 2
        with pytest.raises(openai.APIStatusError) as caught:
            client.embeddings.create(model='default', input=['a', 'b', 'c'])
        assert caught.value.status_code == 413
        assert caught.value.code == 'request_too_large'
