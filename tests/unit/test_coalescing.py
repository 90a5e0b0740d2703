"""Small requests that travel together: each is answered as if it had come alone."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from docarray import Document, DocumentArray
from hypothesis import given, settings
from hypothesis import strategies as st
from jina import Executor, requests
from jina.types.request.data import DataRequest

from finetuner.excepts import ConfigError, TooManyRequestsError
from finetuner.server.coalescing import (
    MOST_DOCUMENTS,
    Coalescer,
    is_small,
    small_documents_of,
)
from finetuner.server.parts import ENDPOINT, answer_parts
from finetuner.server.wire import Documents, find_documents

NO_TRACE = {'tracing_context': None}


class Lengths(Executor):
    """Embeds a text as its length; some texts it treats otherwise."""

    @requests(on='/encode')
    async def encode(
        self, docs: DocumentArray, parameters: dict[str, Any], **_: Any
    ) -> dict[str, Any] | DocumentArray | None:
        """One answer a request."""
        texts = docs.texts
        if 'slow' in texts:
            await asyncio.sleep(3)
        if 'refuse' in texts:
            raise TooManyRequestsError('too many', 7)
        if 'break' in texts:
            raise RuntimeError('secret')
        for doc in docs:
            doc.embedding = np.array([len(doc.text) * parameters.get('factor', 1)])
            doc.tags['seen'] = len(docs)
        if 'many' in texts:
            return DocumentArray([*docs, *docs])
        if 'nothing' in texts:
            return None
        return {'tokens': len(''.join(texts)), 'seconds': parameters['__timeout']}

    @requests(on=ENDPOINT)
    async def encode_parts(
        self, docs: DocumentArray, parameters: dict[str, Any], tracing_context: Any = None, **_: Any
    ) -> dict[str, Any]:
        """Several at a time."""
        return await answer_parts(self, docs, parameters, tracing_context)


class Caller:
    """Has an Executor answer messages as Jina's worker does, but without a network.

    Attributes:
        calls: endpoint and number of Documents of each.
    """

    def __init__(self, seconds: float = 0.01) -> None:
        self.calls: list[tuple[str, int]] = []
        self.cancelled = 0
        self._executor = Lengths()
        self._seconds = seconds

    async def __call__(self, request: DataRequest, endpoint: str) -> DataRequest:
        raw = request.buffer if request.buffer is not None else request.SerializeToString()
        header = DataRequest(raw).proto_wo_data.header
        assert header.exec_endpoint == endpoint
        self.calls.append((endpoint, find_documents(raw, 100).count))
        answer = DataRequest(raw)
        try:
            docs = answer.docs
            await asyncio.sleep(self._seconds)
            result = await self._executor.__acall__(
                endpoint, docs=docs, parameters=answer.parameters, **NO_TRACE
            )
            parameters = answer.parameters
            if isinstance(result, dict):
                parameters['__results__'] = {'lengths/rep-0': result}
                answer.parameters = parameters
            answer.data.docs = result if isinstance(result, DocumentArray) else docs
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        except Exception as error:
            answer = DataRequest()
            answer.header.CopyFrom(header)
            answer.add_exception(error, self._executor)
        else:
            answer.add_executor('lengths')
        return DataRequest(answer.SerializeToString())


def ignore(num_requests: int) -> None:
    """Of calls that a test does not count."""


def ask(texts: list[str], number: int = 0, **parameters: Any) -> DataRequest:
    request = DataRequest()
    request.header.request_id = f'id-{number}'
    request.header.exec_endpoint = '/encode'
    request.parameters = {
        '__identity': 'sealed',
        '__timeout': 100,
        '__request_id': str(number),
        **parameters,
    }
    request.data.docs = DocumentArray(
        [
            Document(id=f'{number}-{i}', text=text, tags={'of': number})
            for i, text in enumerate(texts)
        ]
    )
    return DataRequest(request.SerializeToString())


def send(coalescer: Coalescer, request: DataRequest, seconds: float = 50) -> Awaitable[DataRequest]:
    found = find_documents(request.buffer, 1000)
    return coalescer.answer(request, lambda: found, time.monotonic() + seconds)


def answer_all(caller: Caller, asked: list[DataRequest]) -> list[DataRequest]:
    async def run() -> list[DataRequest]:
        coalescer = Coalescer(caller, ignore)
        return await asyncio.gather(*(send(coalescer, each) for each in asked))

    return asyncio.run(run())


def plain(answer: DataRequest) -> dict[str, Any]:
    """What a client sees of an answer."""
    status = answer.header.status
    parameters = answer.parameters
    for result in parameters.get('__results__', {}).values():
        # what is left of the time differs
        result.pop('seconds', None)
    parameters.pop('__timeout', None)
    return {
        'id': answer.header.request_id,
        'endpoint': answer.header.exec_endpoint,
        'error': (status.code, status.exception.name, list(status.exception.args)),
        'executor': status.exception.executor,
        'docs': [] if status.code else answer.docs.to_dict(),
        'parameters': {} if status.code else parameters,
        'routes': [] if status.code else [route.executor for route in answer.routes],
    }


TEXTS = st.lists(
    st.sampled_from(['a', 'bb', 'cccc', 'ünï', '', 'refuse', 'break', 'many', 'nothing']),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.integers(1, 2)), min_size=1, max_size=40))
def test_each_is_answered_as_if_it_had_come_alone(many):
    asked = [ask(texts, i, factor=factor) for i, (texts, factor) in enumerate(many)]
    together = Caller()
    answers = answer_all(together, [DataRequest(each.buffer) for each in asked])
    for request, answer in zip(asked, answers, strict=True):
        (alone,) = answer_all(Caller(0), [request])
        seen, expected = plain(answer), plain(alone)
        assert seen == expected
    joined = [count for endpoint, count in together.calls if endpoint == ENDPOINT]
    assert all(count <= MOST_DOCUMENTS for count in joined)
    if not any('break' in texts for texts, _ in many):
        # otherwise those beside it are asked for again
        assert sum(count for _, count in together.calls) == sum(len(texts) for texts, _ in many)


def test_many_small_ones_take_few_calls_and_few_go_at_once():
    caller = Caller()
    answer_all(caller, [ask(['a'], i) for i in range(40)])
    assert caller.calls[:2] == [('/encode', 1)] * 2
    assert [endpoint for endpoint, _ in caller.calls[2:]] == [ENDPOINT] * 3
    assert sum(count for _, count in caller.calls) == 40


def test_other_parameters_travel_in_another_call():
    caller = Caller()
    asked = [ask(['aa'], i, factor=1 + i % 3) for i in range(20)]
    answers = answer_all(caller, asked)
    assert [each.docs[0].embedding[0] for each in answers] == [2 * (1 + i % 3) for i in range(20)]
    assert len(caller.calls) == 2 + 3


def test_none_waits_for_calls_that_take_long():
    async def run() -> None:
        slow = Caller(seconds=1.0)
        coalescer = Coalescer(slow, ignore)
        begun = [asyncio.ensure_future(send(coalescer, ask(['a'], i))) for i in range(4)]
        await asyncio.sleep(0.1)
        # those two that found no free call were sent together all the same
        assert slow.calls == [('/encode', 1), ('/encode', 1), (ENDPOINT, 2)]
        await asyncio.gather(*begun)

    asyncio.run(run())


def test_each_part_has_the_time_of_its_own_client():
    async def run() -> list[DataRequest]:
        coalescer = Coalescer(Caller(), ignore)
        asked = [ask(['a'], i) for i in range(6)]
        return await asyncio.gather(
            *(send(coalescer, each, 10 * (i + 1)) for i, each in enumerate(asked))
        )

    answers = asyncio.run(run())
    seconds = [each.parameters['__results__']['lengths/rep-0']['seconds'] for each in answers]
    # those that go alone bring their own
    assert seconds[:2] == [100, 100]
    assert seconds[2:] == pytest.approx([30, 40, 50, 60], abs=1)


def test_a_message_that_cannot_be_opened_takes_no_other_with_it():
    broken = bytearray(ask(['spoilt'], 3).buffer)
    place = bytes(broken).index(b'spoilt')
    broken[place] = 0xFF  # no UTF-8 begins so
    asked = [ask(['a'], i) for i in range(6)]
    asked[3] = DataRequest(bytes(broken))
    caller = Caller()
    answers = answer_all(caller, asked)
    assert [each.header.status.code == 1 for each in answers] == [False] * 3 + [True] + [False] * 2
    # together, and then each by itself
    assert [endpoint for endpoint, _ in caller.calls].count('/encode') == 6


@pytest.mark.parametrize('gone', [{0, 1, 2, 3, 4, 5}, {4}, {2, 3, 4, 5}])
def test_whoever_goes_away_leaves_the_others(gone):
    async def run() -> None:
        caller = Caller(seconds=0.2)
        coalescer = Coalescer(caller, ignore)
        tasks = [asyncio.ensure_future(send(coalescer, ask(['aa'], i))) for i in range(6)]
        await asyncio.sleep(0.1)
        for number in gone:
            tasks[number].cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for number, outcome in enumerate(outcomes):
            if number in gone:
                assert isinstance(outcome, asyncio.CancelledError)
            else:
                assert outcome.docs[0].embedding[0] == 2
        await asyncio.sleep(0)
        # those that nobody waits for any more are given up
        assert caller.cancelled == len(gone & {0, 1}) + (gone >= {2, 3, 4, 5})

    asyncio.run(run())


def test_who_goes_away_before_the_call_is_not_in_it():
    async def run() -> None:
        caller = Caller(seconds=0.1)
        coalescer = Coalescer(caller, ignore)
        tasks = [asyncio.ensure_future(send(coalescer, ask(['aa'], i))) for i in range(6)]
        await asyncio.sleep(0)
        for task in tasks[3:5]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert caller.calls == [('/encode', 1), ('/encode', 1), (ENDPOINT, 2)]

    asyncio.run(run())


@pytest.mark.parametrize('error', [ConfigError('no'), RuntimeError('gone')])
def test_everybody_learns_that_no_executor_is_there(error):
    async def fail(_: DataRequest, __: str) -> DataRequest:
        await asyncio.sleep(0.01)
        raise error

    async def run() -> list[Any]:
        coalescer = Coalescer(fail, ignore)
        waiting = [send(coalescer, ask(['a'], i)) for i in range(6)]
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert asyncio.run(run()) == [error] * 6


@pytest.mark.parametrize(
    ('make', 'expected'),
    [
        (lambda: [Document(text='a')], True),
        (lambda: [Document(text='a', tags={'b': 1})] * 8, True),
        (lambda: [Document(text='a')] * 9, False),
        (lambda: [], False),
        (lambda: [Document(uri='http://somewhere/a.jpg')], False),
        (lambda: [Document(text='a'), Document(text='b', chunks=[Document()])], False),
        (lambda: [Document(text='a', matches=[Document()])], False),
        (lambda: [Document(blob=bytes(200_000))], True),
        (lambda: [Document(blob=bytes(300_000))], False),
    ],
)
def test_which_requests_are_small(make: Callable[[], list[Document]], expected: bool):
    request = DataRequest()
    request.data.docs = DocumentArray(make())
    assert is_small(find_documents(request.SerializeToString(), 100)) is expected


def test_what_is_too_much_is_not_small():
    assert not is_small(Documents(11, (), False))


def test_a_lone_request_is_handed_on_as_it_came_and_not_read():
    seen = []

    def find() -> Documents:
        raise AssertionError('read, though it waits for nobody')

    async def keep(request: DataRequest, endpoint: str) -> DataRequest:
        seen.append((request, endpoint))
        return request

    request = ask(['a'])
    asyncio.run(Coalescer(keep, ignore).answer(request, find, 0))
    assert seen == [(request, '/encode')]


def test_a_large_one_goes_alone_while_calls_are_on_their_way():
    caller = Caller(seconds=0.05)

    async def run() -> None:
        coalescer = Coalescer(caller, ignore)
        until = time.monotonic() + 50
        await asyncio.gather(
            *(coalescer.answer(ask(['a'], i), lambda: None, until) for i in range(6))
        )

    asyncio.run(run())
    assert [endpoint for endpoint, _ in caller.calls] == ['/encode'] * 6


def test_a_slow_request_keeps_its_neighbours_waiting_for_a_while_only():
    async def run() -> None:
        caller = Caller()
        coalescer = Coalescer(caller, ignore)
        texts = ['a', 'a', 'a', 'slow', 'a']
        began = time.monotonic()
        asked = [asyncio.ensure_future(send(coalescer, ask([t], i))) for i, t in enumerate(texts)]
        await asyncio.wait([asked[i] for i in (0, 1, 2, 4)])
        assert time.monotonic() - began < 2
        answer = await asked[3]
        assert answer.docs[0].embedding[0] == 4
        # begun together, ended by itself
        assert caller.calls == [('/encode', 1)] * 2 + [(ENDPOINT, 3), ('/encode', 1)]

    asyncio.run(run())


def test_an_answer_that_is_there_comes_before_its_time_is_over():
    async def run() -> None:
        coalescer = Coalescer(Caller(), ignore)
        texts = ['a', 'a', 'a', 'slow', 'a']
        began = time.monotonic()
        asked = [
            asyncio.ensure_future(send(coalescer, ask([text], i), 100 if text == 'slow' else 0.4))
            for i, text in enumerate(texts)
        ]
        await asyncio.wait([asked[i] for i in (0, 1, 2, 4)])
        assert time.monotonic() - began < 0.8
        asked[3].cancel()

    asyncio.run(run())


def test_each_replica_has_calls_of_its_own():
    async def run() -> list[tuple[str, int]]:
        caller = Caller()
        coalescer = Coalescer(caller, ignore, lambda: 3)
        await asyncio.gather(*(send(coalescer, ask(['a'], i)) for i in range(10)))
        return caller.calls

    assert asyncio.run(run()) == [('/encode', 1)] * 6 + [(ENDPOINT, 4)]


def test_nobody_waits_for_a_call_that_was_cut_off():
    async def cut_off(_: DataRequest, __: str) -> DataRequest:
        await asyncio.sleep(0.01)
        raise asyncio.CancelledError

    async def run() -> list[Any]:
        coalescer = Coalescer(cut_off, ignore)
        waiting = [asyncio.ensure_future(send(coalescer, ask(['a'], i))) for i in range(6)]
        return await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)

    assert all(isinstance(each, asyncio.CancelledError) for each in asyncio.run(run()))


class Wrong(Caller):
    """One whose answers to several requests are not what was agreed."""

    def __init__(self, spoil: Callable[[DataRequest], None]) -> None:
        super().__init__()
        self._spoil = spoil

    async def __call__(self, request: DataRequest, endpoint: str) -> DataRequest:
        answer = await super().__call__(request, endpoint)
        if endpoint == ENDPOINT:
            opened = DataRequest(answer.buffer)
            self._spoil(opened)
            answer = DataRequest(opened.proto_with_data.SerializeToString())
        return answer


def answer_twice(answer: DataRequest) -> None:
    results = answer.parameters['__results__']
    answer.parameters = {'__results__': {**results, 'shard-1': results['lengths/rep-0']}}


def lose_a_document(answer: DataRequest) -> None:
    answer.data.docs = answer.docs[:-1]


def lose_a_part(answer: DataRequest) -> None:
    results = answer.parameters['__results__']
    answer.parameters = {'__results__': {'a': {'__parts': results['lengths/rep-0']['__parts'][1:]}}}


def lose_all(answer: DataRequest) -> None:
    answer.parameters = {}


@pytest.mark.parametrize('spoil', [answer_twice, lose_a_document, lose_a_part, lose_all])
def test_where_answers_cannot_be_told_apart_each_is_asked_for_by_itself(spoil):
    caller = Wrong(spoil)
    answers = answer_all(caller, [ask(['a' * (i + 1)], i) for i in range(6)])
    assert [each.docs[0].embedding[0] for each in answers] == [1, 2, 3, 4, 5, 6]
    assert caller.calls == [('/encode', 1)] * 2 + [(ENDPOINT, 4)] + [('/encode', 1)] * 4


def test_the_routes_of_a_request_stay():
    asked = [ask(['a'], i) for i in range(4)]
    for each in asked:
        opened = DataRequest(each.buffer)
        opened.add_executor('before')
        each.buffer = opened.proto_with_data.SerializeToString()
    for answer in answer_all(Caller(), asked):
        assert [route.executor for route in answer.routes] == ['before', 'lengths']


@pytest.mark.parametrize(
    ('make', 'is_found'),
    [
        (lambda: [Document(text='a')] * 8, True),
        (lambda: [Document(text='a', tags={str(i): i for i in range(9_000)})], True),
        (lambda: [Document(blob=bytes(600_000))], False),
        (lambda: [Document(text='a', chunks=[Document() for _ in range(200)])], False),
    ],
)
def test_which_requests_that_came_over_http_are_small(make, is_found):
    request = DataRequest()
    request.data.docs = DocumentArray(make())
    assert (small_documents_of(request) is not None) is is_found
