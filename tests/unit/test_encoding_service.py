"""What a request may ask for beside its Documents: another model, fewer numbers, an end to waiting."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest

from finetuner.encoding.batcher import Batcher
from finetuner.encoding.model_pool import ModelPool
from finetuner.encoding.service import EncodingOptions, EncodingService
from finetuner.excepts import ConfigError, DeadlineError, NotFoundError
from tests.unit.plain_engine import DIMENSION, PlainEngine, documents


@pytest.fixture
def engines():
    return {'plain': PlainEngine(), 'threefold': PlainEngine(factor=3)}


@pytest.fixture
def service(engines):
    def resolve(name, owner):
        if name not in engines:
            raise NotFoundError(f'there is no {name}')
        return name

    encoding = EncodingService(ModelPool('plain', resolve, engines.__getitem__), Batcher())
    yield encoding
    for engine in engines.values():
        engine.may_embed.set()
    encoding.close()


def encode(service, docs, **options):
    return asyncio.run(service.encode(docs, EncodingOptions(**options)))


def test_a_request_may_name_its_model(service):
    embedded, model = encode(service, documents(1))
    assert (embedded.embeddings[0][0], model.key) == (2, 'plain')
    embedded, model = encode(service, documents(1), model='threefold')
    assert (embedded.embeddings[0][0], model.key) == (3, 'threefold')
    with pytest.raises(NotFoundError):
        encode(service, documents(1), model='other')
    with pytest.raises(ConfigError, match="select_model='clip-text': plain is a single model"):
        encode(service, documents(1), select_model='clip-text')
    with pytest.raises(ConfigError, match="did you mean 'clip-text'"):
        encode(service, documents(1), select_model='clip-texts')


def test_who_asks_for_a_loaded_model_does_not_wait_for_one_that_is_not():
    may_load = threading.Event()

    def load(key):
        if key == 'late':
            may_load.wait()
        return PlainEngine()

    service = EncodingService(ModelPool('plain', lambda name, _: name, load), Batcher())

    async def ask():
        await service.encode(documents(1), EncodingOptions(model='there'))
        late = [
            asyncio.create_task(service.encode(documents(1), EncodingOptions(model='late')))
            for _ in range(40)
        ]
        await asyncio.sleep(0.05)
        found = await asyncio.wait_for(
            service.encode(documents(1), EncodingOptions(model='there')), 10
        )
        may_load.set()
        return found, await asyncio.gather(*late)

    try:
        (embedded, model), late = asyncio.run(ask())
    finally:
        may_load.set()
        service.close()
    assert (embedded.embeddings[0][0], model.key) == (2, 'there')
    assert {model.key for _, model in late} == {'late'}


def test_embeddings_are_cut_to_a_length_they_were_trained_for(service, engines):
    engines['plain'].spec = replace(engines['plain'].spec, matryoshka_dims=(2,))
    docs = documents(1)
    docs[0].tensor = np.array([3, 4, 0, 12], np.float32)
    assert encode(service, docs, output_dim=2)[0].embeddings[0].tolist() == [6, 8]
    cut = encode(service, docs, output_dim=2, normalize=True)[0].embeddings[0]
    assert cut == pytest.approx([0.6, 0.8])
    whole = encode(service, docs, output_dim=DIMENSION)[0].embeddings[0]
    assert whole.tolist() == [6, 8, 0, 24]
    with pytest.raises(ConfigError, match=r'output_dim=3: .* good at 2, 4 numbers'):
        encode(service, docs, output_dim=3)
    with pytest.raises(ConfigError, match='good at 4 numbers'):
        encode(service, docs, output_dim=2, model='threefold')


def test_the_beginning_of_an_embedding_of_length_1_has_length_1_too(service, engines):
    engines['plain'].spec = replace(engines['plain'].spec, matryoshka_dims=(2,))
    docs = documents(1)
    docs[0].tensor = np.array([0.15, 0.2, 0.433, 0], np.float32)
    cut = encode(service, docs, output_dim=2)[0].embeddings[0]
    assert cut == pytest.approx([0.6, 0.8], abs=1e-3)


def test_a_zero_embedding_stays_one(service):
    assert not encode(service, documents(0), normalize=True)[0].embeddings[0].any()


def test_who_waits_too_long_is_told_and_nothing_of_theirs_is_left(service, engines):
    engines['plain'].may_embed.clear()
    with pytest.raises(DeadlineError, match=r'3 Documents were not embedded within 0\.05 seconds'):
        encode(service, documents(1, 2, 3), seconds=0.05)
    engines['plain'].may_embed.set()
    assert encode(service, documents(4))[0].embeddings[0][0] == 8
    while service.batcher.num_waiting:
        pass


def test_who_goes_away_is_not_embedded_for(service, engines):
    async def leave():
        engines['plain'].may_embed.clear()
        task = asyncio.ensure_future(service.encode(documents(*range(100)), EncodingOptions()))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    engines['plain'].may_embed.set()
    encode(service, documents(1))
    assert sum(engines['plain'].batches) < 50
