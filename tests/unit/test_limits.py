"""Limits of the gateway: options, places for requests, ids and times that clients give."""

import asyncio

import pytest

from finetuner.excepts import ConfigError, TooLargeError, TooManyRequestsError
from finetuner.server.calls import Call, request_id_of, seconds_of
from finetuner.server.limits import ByteBudget, Limits, Slots, least_bytes


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'max_documents': 0}, 'max_documents is 0'),
        ({'max_documents': 2.5}, 'whole number'),
        ({'max_requests': True}, 'max_requests is True'),
        ({'max_request_mb': 4096}, 'from 0 to 2047'),
        ({'request_seconds': float('nan')}, 'request_seconds is nan'),
        ({'request_seconds': float('inf')}, 'request_seconds is inf'),
        ({'request_seconds': '9'}, "request_seconds is '9'"),
        ({'drain_seconds': -1}, 'drain_seconds is -1'),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Limits(**options)


def test_options_in_range():
    limits = Limits(max_documents=5.0, drain_seconds=0, max_request_mb=0.5)
    assert limits.max_documents == 5
    assert limits.max_request_bytes == 512 << 10
    limits.check_documents(5)
    with pytest.raises(TooLargeError, match='6 Documents'):
        limits.check_documents(6)
    limits.check_bytes(512 << 10)
    with pytest.raises(TooLargeError, match=r'0\.5 MiB'):
        limits.check_bytes((512 << 10) + 1)


def test_bytes_are_given_back_and_one_request_fits_always():
    limits = Limits(max_request_mb=2, max_total_mb=1)
    assert limits.max_total_bytes == 2 << 20
    assert Limits().max_total_bytes == 1 << 30
    budget = ByteBudget(10)
    assert budget.take(10)
    assert not budget.take(1)
    with pytest.raises(TooManyRequestsError, match='max_total_mb'):
        budget.take_or_refuse(1)
    budget.give_back(4)
    with budget.taken(4):
        assert budget.held == 10
    with pytest.raises(KeyError), budget.taken(3):
        raise KeyError
    assert budget.held == 6


@pytest.mark.parametrize(
    ('num_bytes', 'a_second'), [(0, 500), (450_000, 500), (9 << 20, 10485.76), (1 << 40, 1 << 16)]
)
def test_how_fast_a_client_must_send(num_bytes, a_second):
    assert least_bytes(num_bytes, 20) == pytest.approx(20 * a_second)


def test_the_shorter_time_counts():
    limits = Limits(request_seconds=10)
    now = limits.until(None) - 10
    assert limits.until(2) - now == pytest.approx(2, abs=0.5)
    assert limits.until(60) - now == pytest.approx(10, abs=0.5)


def test_places_are_given_back_and_counted_once():
    async def run() -> None:
        slots = Slots(2)
        first, second, third = (Call('http', str(i)) for i in range(3))
        with slots.taken_for(first), slots.taken_for(second):
            with slots.taken_for(first):
                assert slots.in_flight == 2
            with pytest.raises(TooManyRequestsError) as caught, slots.taken_for(third):
                pass
            assert caught.value.retry_after > 0
            assert not await slots.empty(0.01)
        assert slots.in_flight == 0
        with pytest.raises(RuntimeError), slots.taken_for(third):
            raise RuntimeError
        assert await slots.empty(0.01)
        slots.is_closed = True
        with pytest.raises(TooManyRequestsError, match='about to end'), slots.taken_for(first):
            pass
        # a stream that was let in before may go on
        with slots.taken_for(Call('grpc', 'a')):
            assert slots.in_flight == 1

    asyncio.run(run())


@pytest.mark.parametrize('given', [None, '', 'a b', 'a\n', 'x' * 65, 'ä', b'\xff', '{"a": 1}'])
def test_ids_that_could_disturb_a_log_are_replaced(given):
    made = request_id_of(given)
    assert len(made) == 32
    assert made.isalnum()


def test_sane_ids_are_kept():
    assert request_id_of('Mine-1_2.3') == 'Mine-1_2.3'
    assert request_id_of(b'mine') == 'mine'


def test_seconds_that_clients_wait():
    assert seconds_of(None) is None
    assert seconds_of('2.5') == 2.5
    for wrong in ('0', '-1', 'inf', 'nan', 'soon', '', '1s'):
        with pytest.raises(ConfigError, match='X-Request-Timeout'):
            seconds_of(wrong)
