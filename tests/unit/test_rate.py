"""How fast something goes, while there is something to do."""

import pytest

from finetuner.encoding import rate


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(rate, 'time', clock)
    return clock


def test_the_first_count_says_all_there_is_to_say(clock):
    counted = rate.Rate()
    assert counted.per_second == 0
    clock.now += 0.5
    counted.count(20)
    assert counted.per_second == pytest.approx(40)


def test_idle_time_does_not_count(clock):
    counted = rate.Rate()
    for _ in range(10):
        clock.now += 0.1
        counted.count(8)
    clock.now += 3600
    counted.resume()
    assert counted.per_second == pytest.approx(80)
    clock.now += 0.1
    counted.count(8)
    assert counted.per_second == pytest.approx(80)


def test_what_was_long_ago_counts_little(clock):
    counted = rate.Rate()
    for _ in range(100):
        clock.now += 1
        counted.count(100)
    for _ in range(30):
        clock.now += 1
        counted.count(10)
    assert 10 < counted.per_second < 20
