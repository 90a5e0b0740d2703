"""The encoding service under mixed load while its model is swapped a hundred times.

Two minutes by default. An hour, as `docs/serving.md` tells of it:

    SOAK_SECONDS=3600 python -m pytest tests/integration/test_soak.py -s
"""

from __future__ import annotations

import asyncio
import os
import statistics

import numpy as np
import pytest
from docarray import Document, DocumentArray

from examples.emoji_data import load_emoji
from finetuner.inference import load_engine
from finetuner.server.requests import fit_request
from tests.integration.serving import REPOSITORY, serve, store_of
from tests.integration.soak import Load, put_under_load

FLOW = (REPOSITORY / 'flows' / 'train-and-encode.yml').read_text()
ALIAS = 'shoes@production'
SECONDS = float(os.environ.get('SOAK_SECONDS', '60'))
NUM_SWAPS = 100
QUICK = {
    'model': 'efficientnet-lite0',
    'model_options': {'input_size': 32},
    'epochs': 1,
    'batch_size': 8,
    'num_workers': 0,
    'device': 'cpu',
    'learning_rate': 0.01,
    'wait': True,
}


@pytest.mark.timeout(SECONDS + 300)
def test_swapping_models_under_load(tmp_path):
    flow = FLOW.replace(
        'artifact: efficientnet-lite0  # or the artifact id that /fit answered',
        f'artifact: {ALIAS}',
    )
    assert ALIAS in flow
    with serve(flow, tmp_path, FINETUNER_TOKEN='') as server, store_of(server) as store:
        train = load_emoji('train', blobs=True)
        client = server.client()
        ids = [
            client.post(**fit_request(train[:n], {**QUICK, 'seed': n}))[0].tags['artifact_id']
            for n in (32, 40)
        ]
        # until now there was nothing that it could serve
        store.set_alias(ALIAS, ids[0])
        pictures = [doc.blob for doc in load_emoji('test', blobs=True)[:16]]
        load = Load(pictures, {each: embeddings_of(store, each, pictures) for each in ids})
        first, second = load.expected.values()
        assert np.abs(first - second).max() > 0.1 * np.abs(first).max()
        wait_until_served(server)
        asyncio.run(put_under_load(load, server, store, ALIAS, SECONDS, NUM_SWAPS))
        memory = [size for seconds, size in load.memory if seconds > SECONDS / 4]
    third = len(memory) // 3
    before, after = statistics.median(memory[:third]), statistics.median(memory[-third:])
    print(
        f'\n{SECONDS:.0f} s, {load.num_swaps} swaps, {load.answers.total():,} requests answered '
        f'({" and ".join(str(count) for count in load.answers.values())} by either model), '
        f'{load.num_documents:,} Documents, {len(load.problems)} failed or mixed; memory '
        f'{before / 2**20:.0f} MB, at the end {after / 2**20:.0f} MB'
    )
    assert load.problems == []
    assert load.num_swaps == NUM_SWAPS
    assert min(load.answers[each] for each in ids) > 0.2 * load.answers.total()
    assert after < 1.1 * before


def embeddings_of(store, artifact_id: str, pictures: list[bytes]) -> np.ndarray:
    docs = DocumentArray([Document(blob=picture) for picture in pictures])
    assert load_engine(store.find_artifact(artifact_id)).encode_documents(docs) == []
    return docs.embeddings


def wait_until_served(server) -> None:
    for _ in range(200):
        if server.client().post('/ready')[0].tags['ready']:
            return
    raise AssertionError('the alias stands for a model, and is not served')
