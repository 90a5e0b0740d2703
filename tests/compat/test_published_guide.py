"""Finetuner's getting-started guide, statement by statement, on a part of the emoji pictures.

The steps, their order and their arguments are the published ones. What is different: the pictures
come from a folder and there are few of them; the cloud's login is called and changes nothing; the
backbone is the one whose weights are at hand; pictures are small and there is one epoch;
FinetunerExecutor is a class and a file of this repository instead of an image in a hub.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from docarray import Document, DocumentArray
from emoji_data import load_emoji

import finetuner
from finetuner.callback import EvaluationCallback
from finetuner.client import get_client
from tests.scripts import REPOSITORY, run_script

MODEL = 'efficientnet-lite0'
SMALL = {'input_size': 64}
NUM_CONCEPTS, NUM_TEST_CONCEPTS = 40, 20
METRICS = ['precision_at_k', 'recall_at_k', 'f1_score_at_k', 'hit_at_k', 'average_precision']
METRICS += ['reciprocal_rank', 'dcg_at_k']

matplotlib.use('Agg')


@pytest.fixture(autouse=True, scope='module')
def finetuner_home(tmp_path_factory):
    """One home for the whole guide: its steps build on each other."""
    home = tmp_path_factory.mktemp('guide')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FINETUNER_HOME', str(home))
        yield home


# Data preparation


@pytest.fixture(scope='module')
def dataset():
    """Pictures in the order of their objects, four of each; nothing is opened."""
    pictures = [
        *load_emoji('train')[: 4 * NUM_CONCEPTS],
        *load_emoji('test')[: 4 * NUM_TEST_CONCEPTS],
    ]
    dataset = DocumentArray()
    for number, picture in enumerate(pictures):
        dataset.append(Document(uri=picture.uri, tags={'number': number}))
    return dataset


@pytest.fixture(scope='module')
def test_files(dataset):
    return dataset[4 * NUM_CONCEPTS :]


@pytest.fixture(scope='module')
def train_data(dataset):
    train_dataset = DocumentArray()
    for i, image_doc in enumerate(dataset[: 4 * NUM_CONCEPTS]):
        train_doc = Document(
            uri=image_doc.uri, tags={'finetuner_label': (i // 4)}
        ).load_uri_to_blob()
        train_dataset.append(train_doc)
    return train_dataset


@pytest.fixture(scope='module')
def query_and_index(test_files):
    query_data, index_data = DocumentArray(), DocumentArray()
    for i, image_doc in enumerate(test_files):
        doc = Document(uri=image_doc.uri, tags={'finetuner_label': (i // 4)}).load_uri_to_blob()
        (query_data if i % 4 == 0 else index_data).append(doc)
    return query_data, index_data


def drawn_picture() -> np.ndarray:
    """What the last plot of docarray shows."""
    from matplotlib import pyplot as plt

    (image,) = plt.gca().images
    pixels = np.asarray(image.get_array())
    plt.close('all')
    return pixels


@pytest.mark.filterwarnings('ignore:.*non-interactive.*')
def test_data_preparation(dataset, train_data, query_and_index):
    dataset[:8].plot_image_sprites()
    assert np.unique(drawn_picture()).size > 50
    assert dataset[0].content is None  # a uri and a tag, until the data sets are made of it
    assert len(train_data) == 4 * NUM_CONCEPTS
    assert train_data[7].tags['finetuner_label'] == 1
    assert train_data[7].blob == Path(train_data[7].uri).read_bytes()
    query_data, index_data = query_and_index
    assert (len(query_data), len(index_data)) == (NUM_TEST_CONCEPTS, 3 * NUM_TEST_CONCEPTS)


# Configure and submit


def test_login_is_harmless(finetuner_home):
    assert finetuner.login(force=True) is None
    assert finetuner.get_token() == ''
    assert list(finetuner_home.iterdir()) == []


@pytest.fixture(scope='module')
def run(train_data, query_and_index):
    query_data, index_data = query_and_index
    finetuner.login(force=True)
    return finetuner.fit(
        model=MODEL,
        train_data=train_data,
        loss='TripletMarginLoss',
        batch_size=128,
        epochs=1,
        learning_rate=1e-4,
        model_options=SMALL,
        callbacks=[
            EvaluationCallback(
                query_data=query_data,
                index_data=index_data,
                limit=3,
            )
        ],
    )


def test_fit_returns_a_run_at_once(run):
    assert run.status()['status'] in ('CREATED', 'STARTED')
    assert [other.name for other in finetuner.list_runs()] == [run.name]
    config = finetuner.get_run(run.name).config
    assert (config['loss'], config['batch_size'], config['epochs']) == ('TripletMarginLoss', 128, 1)
    assert config['learning_rate'] == 1e-4
    with pytest.raises(finetuner.excepts.RunInProgressError):
        _ = run.artifact_id


# Monitor


@pytest.fixture(scope='module')
def messages(run):
    messages = []
    for message in run.stream_logs():
        print(message)
        messages.append(message)
    return messages


def test_stream_logs_tells_the_run_and_ends_with_it(run, messages):
    assert run.status()['status'] == 'FINISHED', messages
    log = '\n'.join(messages)
    assert 'Evaluation, before training' in log
    assert 'Epoch 1/1 done' in log
    assert run.logs() == log


# Use the model


@pytest.fixture(scope='module')
def model(run, messages):
    return finetuner.get_model(run.artifact_id)


@pytest.fixture(scope='module')
def image_uri(test_files):
    return test_files[0].uri


@pytest.fixture(scope='module')
def embeddings(model, image_uri):
    return finetuner.encode(model=model, data=[image_uri])


def test_encode_a_list_of_uris(embeddings):
    assert isinstance(embeddings, np.ndarray)
    assert embeddings.shape == (1, 1280)
    assert np.isfinite(embeddings).all()


@pytest.mark.filterwarnings('ignore:.*non-interactive.*')
def test_compare_with_the_pretrained_model(model, query_and_index, embeddings, capsys):
    query_data, index_data = query_and_index
    pretrained_model = finetuner.build_model(MODEL, SMALL)
    pretrained_queries = finetuner.encode(
        model=pretrained_model, data=DocumentArray(query_data, copy=True)
    )
    pretrained_index = finetuner.encode(
        model=pretrained_model, data=DocumentArray(index_data, copy=True)
    )
    finetuned_queries = finetuner.encode(model=model, data=DocumentArray(query_data, copy=True))
    finetuned_index = finetuner.encode(model=model, data=DocumentArray(index_data, copy=True))
    assert query_data.embeddings is None  # they were copies
    np.testing.assert_allclose(finetuned_queries.embeddings[:1], embeddings, rtol=1e-3, atol=1e-4)
    assert not np.allclose(pretrained_queries.embeddings, finetuned_queries.embeddings, atol=1e-3)

    pretrained_queries.match(pretrained_index)
    finetuned_queries.match(finetuned_index)

    differing = [
        i
        for i in range(len(pretrained_queries))
        if not all(
            pretrained_queries[i].matches[j].tags['finetuner_label']
            == finetuned_queries[i].matches[j].tags['finetuner_label']
            for j in range(3)
        )
    ]
    assert differing
    for queries in (pretrained_queries, finetuned_queries):
        queries[differing[0]].plot_matches_sprites()
        sprites = drawn_picture()
        assert sprites.shape[1] == 1920
        assert np.unique(sprites).size > 50


def test_display_metrics_prints_two_tables(run, messages, capsys):
    run.display_metrics()
    printed = capsys.readouterr().out
    before, after = printed.split('after fine-tuning:')
    assert 'Retrieval metrics before fine-tuning:' in before
    for name in METRICS:
        assert f'{MODEL}_{name}' in before
        assert f'{MODEL}_{name}' in after
    metrics = run.metrics()
    assert str(metrics['after'][f'{MODEL}_recall_at_k']) in after
    # three right answers for each query, and three looked at
    assert metrics['after'][f'{MODEL}_recall_at_k'] == pytest.approx(
        metrics['after'][f'{MODEL}_precision_at_k']
    )


# Serve


SERVICE = """
import json
import finetuner
from docarray import Document, DocumentArray
from jina import Client, Flow
from finetuner.server import FinetunerExecutor

IMAGE_URI = {image_uri!r}
token = finetuner.get_token()
{service}
"""
IN_A_FLOW = """
f = Flow(host='127.0.0.1').add(
    uses=FinetunerExecutor,
    # the guide sends an address; a server opens none unless it is told which
    uses_with={{'artifact': {artifact!r}, 'token': token, 'uri_allow': [{folder!r}]}},
)
with f:
    returned_docs = f.post(on='/encode', inputs=DocumentArray([Document(uri=IMAGE_URI)]))
print(json.dumps(returned_docs[0].embedding.tolist()))
"""
FROM_A_FILE = """
yaml_file = f\"\"\"jtype: Flow
executors:
  - uses: {encoder}
    timeout_ready: -1
    install_requirements: true
    uses_with:
      artifact: {artifact}
      token: {{token}}
\"\"\"
with open('flow.yml', 'w') as f:
    f.write(yaml_file)
with Flow.load_config('flow.yml') as flow:
    client = Client(host=f'grpc://127.0.0.1:{{flow.port}}')
    documents = DocumentArray([Document(uri=IMAGE_URI).load_uri_to_blob()])
    response = client.post('/encode', documents)
print(json.dumps(response[0].embedding.tolist()))
"""


@pytest.mark.parametrize('service', [IN_A_FLOW, FROM_A_FILE], ids=['in a Flow', 'from a file'])
def test_an_encoding_service(run, messages, image_uri, embeddings, tmp_path, service):
    code = SERVICE.format(
        image_uri=image_uri,
        service=service.format(
            artifact=run.artifact_id,
            folder=str(Path(image_uri).parent),
            encoder=REPOSITORY / 'executors' / 'encoder' / 'config.yml',
        ),
    )
    served = json.loads(run_script(code, tmp_path).splitlines()[-1])
    assert finetuner.cos_sim(np.array(served), embeddings[0]) >= 0.9999


def test_delete_what_the_guide_made(run, messages):
    artifact = get_client().find_artifact(run.artifact_id)
    finetuner.delete_run(run.name)
    assert not artifact.exists()
    assert finetuner.list_runs() == []
