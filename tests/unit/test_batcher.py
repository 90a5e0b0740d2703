"""Batches over requests: whose Documents go together, whose turn it is, and what a failure touches."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
from docarray import Document, DocumentArray
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuner.artifact import ModelSpec
from finetuner.encoding.batcher import Batcher, BatcherConfig
from finetuner.encoding.observer import EncodingObserver
from finetuner.engines import OnnxEngine, TorchEngine
from finetuner.excepts import ConfigError, TooLargeError, TooManyRequestsError
from finetuner.inputs import PictureReader, TextReader
from finetuner.models.backbones import PictureSpec, TextSpec
from finetuner.onnx_export import export_to_bytes
from tests.unit.plain_engine import DIMENSION, PlainEngine, documents
from tests.unit.tiny_artifacts import SIZE, assert_same_vectors, make_model, make_spec, pictures

WAIT = 20


class Heard(EncodingObserver):
    def __init__(self):
        self.queue = []
        self.batches = []
        self.read = []
        self.refused = []

    def queue_changed(self, num_documents):
        self.queue.append(num_documents)

    def batch_embedded(self, model, num_documents, seconds):
        self.batches.append((model, num_documents))

    def documents_read(self, num_documents, num_failed, seconds):
        self.read.append((num_documents, num_failed))

    def request_refused(self, reason):
        self.refused.append(reason)


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def batcher(heard):
    with_two_readers = Batcher(BatcherConfig(max_queue=500, num_readers=2, num_embedders=1), heard)
    yield with_two_readers
    with_two_readers.close()


def until(holds):
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def held_up(engine, batcher):
    """Let the engine hold on to a first batch, so that a test says what waits behind it."""
    engine.may_embed.clear()
    first = batcher.submit(documents(0), engine, 'plain')
    assert engine.is_embedding.wait(WAIT)
    return first


def test_documents_of_many_requests_share_a_batch(batcher, heard):
    engine = PlainEngine(batch_size=8)
    first = held_up(engine, batcher)
    others = [batcher.submit(documents(n), engine, 'plain') for n in range(1, 9)]
    until(lambda: sum(n for n, _ in heard.read) == 9)
    engine.may_embed.set()
    for n, future in enumerate([first, *others]):
        assert np.array_equal(future.result(WAIT).embeddings[0], np.full(DIMENSION, 2 * n))
    assert engine.batches == [1, 8]
    assert heard.batches == [('plain', 1), ('plain', 8)]
    assert heard.queue[-1] == 0


def test_a_request_by_itself_is_embedded_in_full_batches(batcher):
    engine = PlainEngine(batch_size=8)
    held_up(engine, batcher)
    future = batcher.submit(documents(*range(20)), engine, 'plain')
    engine.may_embed.set()
    embedded = future.result(WAIT)
    assert np.array_equal(np.stack(embedded.embeddings)[:, 0], 2 * np.arange(20))
    assert embedded.failures == []
    assert sum(engine.batches) == 21
    assert max(engine.batches) == 8


def test_what_is_ready_does_not_wait_for_what_is_slow(batcher):
    engine = PlainEngine()
    engine.reader.may_read.clear()
    slow, quick = documents(1), documents(2)
    slow[0].tags['slow'] = True
    late = batcher.submit(slow, engine, 'plain')
    early = batcher.submit(quick, engine, 'plain')
    assert early.result(WAIT).embeddings[0][0] == 4
    assert not late.done()
    engine.reader.may_read.set()
    assert late.result(WAIT).embeddings[0][0] == 2


def test_a_small_request_is_not_kept_waiting_by_large_ones(batcher):
    engine = PlainEngine(batch_size=4)
    held_up(engine, batcher)
    large = [batcher.submit(documents(*range(200)), engine, 'plain') for _ in range(2)]
    finished = []
    for i, future in enumerate(large):
        future.add_done_callback(lambda _, i=i: finished.append(i))
    small = batcher.submit(documents(7), engine, 'plain')
    at = []
    small.add_done_callback(lambda _: at.append(sum(engine.batches)))
    engine.may_embed.set()
    assert small.result(WAIT).embeddings[0][0] == 14
    for future in large:
        future.result(WAIT)
    # the first place of either large one, and of what was read of them before it came
    assert at[0] <= 1 + 3 * 4


def test_a_later_small_request_comes_before_the_rest_of_a_large_one(batcher):
    engine = PlainEngine(batch_size=4)
    engine.may_embed.clear()
    large = batcher.submit(documents(*range(300)), engine, 'plain')
    assert engine.is_embedding.wait(WAIT)
    embedded_before = []
    engine.may_embed.set()
    until(lambda: sum(engine.batches) > 40)
    engine.may_embed.clear()
    until(lambda: batcher.num_waiting <= 300)
    count = sum(engine.batches)
    small = batcher.submit(documents(7), engine, 'plain')
    small.add_done_callback(lambda _: embedded_before.append(sum(engine.batches)))
    engine.may_embed.set()
    assert small.result(WAIT).embeddings[0][0] == 14
    large.result(WAIT)
    # the batch in hand, and the one it goes into
    assert embedded_before[0] <= count + 3 * 4


def test_a_document_that_cannot_be_read_leaves_the_others_alone(batcher, heard):
    engine = PlainEngine()
    docs = documents(1, 2, 3)
    docs[1].tags['unreadable'] = True
    embedded = batcher.submit(docs, engine, 'plain').result(WAIT)
    assert [each is None for each in embedded.embeddings] == [False, True, False]
    assert [(position, str(error)) for position, error in embedded.failures] == [
        (1, 'Document 1 cannot be read')
    ]
    assert batcher.num_waiting == 0
    assert sum(failed for _, failed in heard.read) == 1


def test_a_request_that_breaks_the_model_leaves_its_batch_mates_alone(batcher, heard):
    engine = PlainEngine()
    held_up(engine, batcher)
    good = batcher.submit(documents(1, 2), engine, 'plain')
    bad = batcher.submit(documents(3, 666), engine, 'plain')
    other = batcher.submit(documents(5), engine, 'plain')
    until(lambda: sum(n for n, _ in heard.read) == 6)
    engine.may_embed.set()
    assert good.result(WAIT).embeddings[1][0] == 4
    assert other.result(WAIT).embeddings[0][0] == 10
    with pytest.raises(RuntimeError, match='the model broke'):
        bad.result(WAIT)
    until(lambda: batcher.num_waiting == 0)


def test_an_embedding_that_is_not_finite_is_refused(batcher):
    embedded = batcher.submit(documents(1, np.nan, np.inf), PlainEngine(), 'plain').result(WAIT)
    assert [position for position, _ in embedded.failures] == [1, 2]
    assert 'Document 1: its embedding is not finite' in str(embedded.failures[0][1])
    assert embedded.embeddings[0][0] == 2


def test_an_unexpected_error_of_a_reader_fails_its_request_alone(batcher):
    engine = PlainEngine()
    bad = batcher.submit(DocumentArray([Document(tensor=['a', 'b'])]), engine, 'plain')
    with pytest.raises(ValueError, match='could not convert'):
        bad.result(WAIT)
    assert batcher.submit(documents(1), engine, 'plain').result(WAIT).embeddings[0][0] == 2


def test_a_request_knows_when_it_was_in_which_stage(batcher):
    engine = PlainEngine(batch_size=8)
    before = time.time()
    held_up(engine, batcher)
    future = batcher.submit(documents(*range(20)), engine, 'plain')
    time.sleep(0.05)
    engine.may_embed.set()
    stages = future.result(WAIT).stages
    assert list(stages) == ['queue', 'read', 'embed']
    assert before <= stages['queue'][0] <= stages['queue'][1] == stages['read'][0]
    assert stages['read'][0] <= stages['embed'][0] < stages['embed'][1] <= time.time()
    assert stages['embed'][0] - stages['queue'][0] > 0.04


def test_no_documents_are_no_work(batcher):
    assert batcher.submit(DocumentArray(), PlainEngine(), 'plain').result(WAIT).embeddings == []


def test_what_may_wait_is_bounded(batcher, heard):
    engine = PlainEngine()
    with pytest.raises(TooLargeError, match=r'501 Documents .* the 500 Documents'):
        batcher.submit(documents(*range(501)), engine, 'plain')
    first = held_up(engine, batcher)
    waiting = batcher.submit(documents(*range(499)), engine, 'plain')
    with pytest.raises(TooManyRequestsError, match='500 Documents wait already') as caught:
        batcher.submit(documents(1), engine, 'plain')
    assert caught.value.retry_after >= 1
    assert heard.refused == ['size', 'queue']
    engine.may_embed.set()
    first.result(WAIT)
    waiting.result(WAIT)
    assert batcher.submit(documents(1), engine, 'plain').result(WAIT).failures == []


def test_the_bytes_that_may_wait_are_bounded(heard):
    batcher = Batcher(BatcherConfig(max_queue_mb=1), heard)
    engine = PlainEngine()
    with pytest.raises(TooLargeError, match='2 MB of contents'):
        batcher.submit(DocumentArray([Document(blob=b'x' * 2**21)]), engine, 'plain')
    held_up(engine, batcher)
    half = DocumentArray([Document(tensor=np.zeros(150_000, np.float32))])
    waiting = batcher.submit(half, engine, 'plain')
    with pytest.raises(TooManyRequestsError, match='1 MB may wait'):
        batcher.submit(half, engine, 'plain')
    engine.may_embed.set()
    waiting.result(WAIT)
    assert batcher.submit(half, engine, 'plain').result(WAIT).failures == []
    batcher.close()


def test_who_goes_away_takes_what_waits_along(batcher):
    engine = PlainEngine(batch_size=4)
    held_up(engine, batcher)
    gone = batcher.submit(documents(*range(100)), engine, 'plain')
    assert gone.cancel()
    stays = batcher.submit(documents(1), engine, 'plain')
    engine.may_embed.set()
    assert stays.result(WAIT).embeddings[0][0] == 2
    until(lambda: batcher.num_waiting == 0)
    # those that were read already, at most
    assert sum(engine.batches) <= 2 + 2 * 4
    with pytest.raises(CancelledError):
        gone.result(WAIT)


def test_what_was_cancelled_leaves_the_queue_while_others_wait_still(batcher):
    engine = PlainEngine(batch_size=4)
    held_up(engine, batcher)
    gone = batcher.submit(documents(*range(400)), engine, 'plain')
    stays = batcher.submit(documents(*range(50)), engine, 'plain')
    gone.cancel()
    # nothing is embedded meanwhile: only who waits is counted
    until(lambda: batcher.num_waiting == 51)
    batcher.submit(documents(*range(400)), engine, 'plain').cancel()
    engine.may_embed.set()
    assert len(stays.result(WAIT).embeddings) == 50
    until(lambda: batcher.num_waiting == 0)


@pytest.mark.parametrize('num_embedders', [2, 5])
def test_all_who_embed_are_woken_for_what_was_read_at_once(num_embedders):
    class Sixteen(PlainEngine):
        """Whose reader reads as many at a time as that of texts does."""

        def __init__(self):
            super().__init__(batch_size=2)
            self.reader.batches_at_once = 8
            self.together = threading.Barrier(num_embedders)

        def embed(self, inputs):
            # goes on when all of them are here
            self.together.wait(WAIT)
            return super().embed(inputs)

    batcher = Batcher(BatcherConfig(num_readers=1, num_embedders=num_embedders))
    future = batcher.submit(documents(*range(2 * num_embedders)), Sixteen(), 'plain')
    assert [row[0] for row in future.result(WAIT).embeddings] == [
        2 * n for n in range(2 * num_embedders)
    ]
    batcher.close()


def test_what_was_taken_is_answered_before_the_end(heard):
    batcher = Batcher(BatcherConfig(), heard)
    engine = PlainEngine()
    held_up(engine, batcher)
    waiting = batcher.submit(documents(*range(50)), engine, 'plain')
    ending = threading.Thread(target=batcher.close)
    ending.start()
    engine.may_embed.set()
    ending.join(WAIT)
    assert not ending.is_alive()
    assert len(waiting.result(0).embeddings) == 50
    with pytest.raises(RuntimeError, match='ending'):
        batcher.submit(documents(1), engine, 'plain')


def test_batches_are_as_small_as_who_asks_wants_them(batcher, heard):
    engine = PlainEngine(batch_size=8)
    first = held_up(engine, batcher)
    small = batcher.submit(documents(*range(6)), engine, 'plain', batch_size=2)
    large = batcher.submit(documents(*range(8)), engine, 'plain', batch_size=1000)
    until(lambda: sum(n for n, _ in heard.read) == 15)
    engine.may_embed.set()
    for future in (first, small, large):
        future.result(WAIT)
    assert engine.batches.count(2) == 3
    assert max(engine.batches) == 8
    with pytest.raises(ConfigError, match='batch_size'):
        batcher.submit(documents(1), engine, 'plain', batch_size=0)


def test_models_are_forgotten_with_their_last_document(batcher):
    futures = [batcher.submit(documents(n), PlainEngine(), str(n)) for n in range(40)]
    for n, future in enumerate(futures):
        assert future.result(WAIT).embeddings[0][0] == 2 * n
    until(lambda: not batcher._lanes)


@pytest.mark.parametrize('name', ['max_queue', 'max_queue_mb', 'num_readers', 'num_embedders'])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=name):
        BatcherConfig(**{name: 0})


@pytest.mark.parametrize('wait', ['5', -1, float('nan'), float('inf'), None, True])
def test_what_is_no_time_to_wait_is_refused(wait):
    with pytest.raises(ConfigError, match='max_wait_ms'):
        BatcherConfig(max_wait_ms=wait)


@pytest.fixture(scope='module')
def text_engine(tmp_path_factory):
    from finetuner.models.tailor import build_embedding_model
    from finetuner.models.zoo import get_backbone
    from tests.unit.tiny_encoder import write_tiny_encoder

    folder = write_tiny_encoder(tmp_path_factory.mktemp('encoder'))
    backbone = get_backbone(str(folder))
    spec = TextSpec(max_length=32)
    model = build_embedding_model(backbone, {'max_length': 32})
    reader = TextReader(spec, folder / 'tokenizer.json')
    return TorchEngine(model, ModelSpec(str(folder), 16, spec), reader, batch_size=2)


def test_texts_of_like_length_go_together(text_engine, batcher):
    rng = np.random.default_rng(0)
    lengths = rng.permutation(np.repeat([1, 26], 100))
    docs = DocumentArray([Document(text=' '.join(['red'] * n)) for n in lengths])
    padded = []
    embed = text_engine.embed

    def recorded(inputs):
        padded.append(inputs['attention_mask'])
        time.sleep(0.005)
        return embed(inputs)

    text_engine.embed = recorded
    embedded = batcher.submit(docs, text_engine, 'texts').result(WAIT)
    text_engine.embed = embed
    assert embedded.num_tokens == sum(lengths + 2)
    assert all(mask.size <= 2 * 64 or len(mask) == 1 for mask in padded)
    # taken as they come, every other token would be one of padding
    assert sum(mask.sum() for mask in padded) / sum(mask.size for mask in padded) > 0.85


def test_a_text_of_another_length_is_not_passed_by_for_ever(
    text_engine, batcher, heard, monkeypatch
):
    """Texts go with those like them; the one that is like none must have its turn as well."""
    embed = text_engine.embed
    monkeypatch.setattr(text_engine, 'embed', lambda inputs: (time.sleep(0.02), embed(inputs))[1])
    texts = [*['red'] * 8, 'red ' * 26]
    docs = DocumentArray([Document(text=text) for text in texts])
    odd = batcher.submit(docs, text_engine, 'x', batch_size=1)
    single = DocumentArray([Document(text='red')])
    waiting = []
    while not odd.done():
        # always more than go into a batch, so that others are first in their requests all the time
        waiting = [future for future in waiting if not future.done()]
        missing = range(60 * 2 - len(waiting))
        waiting += [batcher.submit(single, text_engine, 'x', batch_size=1) for _ in missing]
        assert len(heard.batches) < 300
    assert odd.result(WAIT).failures == []


@pytest.fixture(scope='module')
def picture_engine():
    graph = export_to_bytes(make_model(), pictures())
    return OnnxEngine(graph, make_spec(), PictureReader(PictureSpec(SIZE)), batch_size=4)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_an_embedding_does_not_depend_on_its_company(text_engine, picture_engine, data):
    """Whatever requests, batches and failures are around a Document."""
    rng = np.random.default_rng(1)
    photos = [Document(tensor=rng.integers(0, 256, (20 + n, 30, 3), np.uint8)) for n in range(9)]
    texts = [
        Document(text=' '.join(['red', 'hat', 'the dog'][n % 3] for _ in range(n + 1)))
        for n in range(9)
    ]
    broken = [Document(blob=b'no picture'), Document()]
    kinds = [(picture_engine, photos), (text_engine, texts)]
    expected = [
        [engine.embed(engine.reader.batch([engine.reader.read(doc)]))[0] for doc in docs]
        for engine, docs in kinds
    ]
    requests = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, 1),
                st.lists(st.integers(0, 10), min_size=1, max_size=8),
                st.sampled_from([None, 1, 3]),
            ),
            min_size=1,
            max_size=6,
        )
    )
    batcher = Batcher(BatcherConfig(max_wait_ms=1, num_readers=2, num_embedders=2))
    futures = []
    for kind, numbers, batch_size in requests:
        engine, docs = kinds[kind]
        asked = DocumentArray([[*docs, *broken][number] for number in numbers])
        futures.append(batcher.submit(asked, engine, 'x', batch_size))
    for (kind, numbers, _), future in zip(requests, futures, strict=True):
        embedded = future.result(WAIT)
        assert [position for position, _ in embedded.failures] == [
            place for place, number in enumerate(numbers) if number > 8
        ]
        for number, embedding in zip(numbers, embedded.embeddings, strict=True):
            if number <= 8:
                assert_same_vectors(embedding, expected[kind][number])
    batcher.close()
