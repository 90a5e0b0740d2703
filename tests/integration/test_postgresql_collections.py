"""Collections whose rows are in a real PostgreSQL database: what holds with SQLite, holds there."""

import inspect
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from finetuner.collections import TrainingSet, search
from tests.postgresql import INSTALLED, REASON, postgresql
from tests.unit import test_training_set as with_sqlite

pytestmark = pytest.mark.skipif(not INSTALLED, reason=REASON)

CASES = [
    with_sqlite.test_what_was_fed_is_counted_by_group_and_read_back,
    with_sqlite.test_classes_come_from_the_labels_where_none_were_given,
    with_sqlite.test_saving_tells_what_it_is,
    with_sqlite.test_a_collection_may_be_saved_before_its_first_pair,
    with_sqlite.test_two_who_bring_the_first_images_do_not_mix_them_up,
    with_sqlite.test_a_name_that_was_taken_meanwhile_loses_nothing,
    with_sqlite.test_two_who_add_pairs_at_once_both_do,
    with_sqlite.test_classes_that_two_bring_at_once_are_not_mixed_up,
    with_sqlite.test_removing_leaves_nothing,
    with_sqlite.test_indices_are_those_of_lists,
    with_sqlite.test_labels_are_changed_and_pairs_removed,
    with_sqlite.test_threads_read_one_collection,
    with_sqlite.test_collections_are_found_by_words_kind_and_class,
    with_sqlite.test_words_follow_what_a_collection_is_now,
    with_sqlite.test_collections_are_opened_in_three_ways,
    with_sqlite.test_others_see_what_is_published_and_change_nothing,
    with_sqlite.test_a_name_belongs_to_its_owner,
]


_numbers = itertools.count()


@pytest.fixture(scope='module')
def server():
    with postgresql() as running:
        yield running


@pytest.fixture(autouse=True)
def home(server, tmp_path, monkeypatch):
    """Where collections are kept, their rows in a database of their own."""
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv(
        'FINETUNER_DATABASE_URL', server.create_database(f'collections{next(_numbers)}')
    )
    monkeypatch.delenv('FINETUNER_ARTIFACTS_URL', raising=False)
    return tmp_path / 'home'


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.__name__.removeprefix('test_'))
def test_it_holds(case, home):
    case(**({'home': home} if 'home' in inspect.signature(case).parameters else {}))


@pytest.mark.parametrize(
    'words', ['the', "'", '&', '!', ':*', 'a & !b', "x') OR 1=1 --", '\\', '((', 'NULL', 'ü:a']
)
def test_what_is_looked_for_is_never_a_query_language(words):
    with_sqlite.saved('roofs', count=1, description='the red ones')
    search(words)
    assert [found.name for found in search('roofs red')] == ['roofs']


def test_pairs_that_many_append_at_once_are_all_there():
    made = with_sqlite.saved('shared', count=2)

    def append(number):
        mine = TrainingSet.from_id(made.id)
        mine.feed(with_sqlite.pairs(5, start=100 * number))
        mine.save()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(append, range(1, 7)))
    assert made.count == {'train': 32}
    expected = {with_sqlite.image(seed).tobytes() for seed in (0, 1)}
    expected |= {
        with_sqlite.image(seed).tobytes()
        for n in range(1, 7)
        for seed in range(100 * n, 100 * n + 5)
    }
    assert {np.asarray(point.image).tobytes() for point in made} == expected
    assert len(made.batch(4).train) == 32
