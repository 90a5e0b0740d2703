"""Encoding goes on where it was, and refuses to go on with something else."""

from __future__ import annotations

import os
import shutil

import pytest
from filelock import FileLock

from finetuner.bulk import open_encoded
from finetuner.excepts import ConflictError, DataError
from tests.unit.bulk_cases import (
    encode,
    files_of,
    some_texts,
    write_parquet,
    write_text_artifact,
)

TEXTS = some_texts(100)


@pytest.fixture(scope='module')
def artifact(tmp_path_factory):
    return write_text_artifact(tmp_path_factory.mktemp('resume'))


@pytest.fixture(scope='module')
def finished(artifact, tmp_path_factory):
    folder = tmp_path_factory.mktemp('finished')
    source = write_parquet(folder / 'a.parquet', text=TEXTS, n=list(range(100)))
    encode(source, folder / 'out', artifact)
    return source, folder / 'out'


@pytest.fixture
def begun(finished, tmp_path):
    """An input, and an output of which all is there."""
    source, out = finished
    return source, shutil.copytree(out, tmp_path / 'out')


def test_what_stands_is_not_done_again(artifact, begun):
    source, out = begun
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    summary = encode(source, out, artifact)
    assert (summary.num_reused, summary.num_shards, summary.num_rows) == (3, 3, 100)
    del before[out / '.lock']
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    'harm',
    [
        lambda out: (out / 'part-00001.parquet').unlink(),
        lambda out: (out / 'part-00001.json').unlink(),
        lambda out: (out / 'part-00001.json').write_text('{"shard": 1'),
        lambda out: (out / 'part-00001.json').write_text('{"shard": 1}'),
        lambda out: (out / 'part-00001.json').write_bytes((out / 'part-00000.json').read_bytes()),
        lambda out: os.truncate(out / 'part-00001.parquet', 100),
        lambda out: flip(out / 'part-00001.parquet', 60),
    ],
)
def test_what_does_not_stand_is_done_again_to_the_same_bytes(artifact, begun, harm):
    source, out = begun
    whole = files_of(out)
    harm(out)
    (out / '.unfinished-0-part-00001.parquet').write_bytes(b'PAR1')
    summary = encode(source, out, artifact)
    assert (summary.num_reused, summary.num_shards) == (2, 3)
    assert files_of(out) == whole


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'rows_per_shard': 50}, 'rows_per_shard was 40, now 50'),
        ({'batch_size': 16}, 'batch_size was 32, now 16'),
        ({'keep': ['n']}, r"keep was \[\], now \['n'\]"),
        ({'engine': 'torch'}, "engine was 'auto', now 'torch'"),
        ({'format': 'numpy'}, "format was 'parquet', now 'numpy'"),
    ],
)
def test_another_option_is_refused_and_says_how_to_mend_it(artifact, begun, options, said):
    source, out = begun
    whole = files_of(out)
    with pytest.raises(ConflictError, match=f'{said}.*another output, or restart'):
        encode(source, out, artifact, **options)
    assert files_of(out) == whole
    summary = encode(source, out, artifact, restart=True, **options)
    assert summary.num_reused == 0
    assert len(open_encoded(out)) == 100


def test_how_it_is_done_may_change(artifact, begun):
    source, out = begun
    (out / 'part-00001.parquet').unlink()
    summary = encode(source, out, artifact, num_threads=1, max_failed=0.5, show_progress=False)
    assert summary.num_reused == 2


def test_another_model_or_input_is_refused(artifact, begun, tmp_path):
    source, out = begun
    other = shutil.copytree(artifact, tmp_path / 'other')
    assert encode(source, out, other).num_reused == 3
    (other / 'artifact.json').write_text((other / 'artifact.json').read_text() + '\n')
    with pytest.raises(ConflictError, match='the model is another'):
        encode(source, out, other)
    write_parquet(tmp_path / 'b.parquet', text=['red'])
    with pytest.raises(ConflictError, match=r"'.*b\.parquet' is new"):
        encode([source, tmp_path / 'b.parquet'], out, artifact)
    with pytest.raises(ConflictError, match=r"'.*b\.parquet' is new"):
        encode(tmp_path / 'b.parquet', out, artifact)


def test_an_input_that_was_changed_is_refused(artifact, tmp_path):
    source = write_parquet(tmp_path / 'a.parquet', text=TEXTS)
    encode(source, tmp_path / 'out', artifact)
    write_parquet(source, text=TEXTS[1:])
    with pytest.raises(ConflictError, match=r"a\.parquet' was changed since encoding began"):
        encode(source, tmp_path / 'out', artifact)


def test_a_folder_of_somebody_else_is_refused(artifact, finished, tmp_path):
    (tmp_path / 'part-00000.parquet').write_bytes(b'mine')
    with pytest.raises(ConflictError, match=r'holds part-00000\.parquet, and no plan\.json'):
        encode(finished[0], tmp_path, artifact, restart=True)
    assert (tmp_path / 'part-00000.parquet').read_bytes() == b'mine'
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='cannot be made'):
        encode(finished[0], tmp_path / 'file', artifact)


def test_one_process_at_a_time(artifact, begun):
    source, out = begun
    with FileLock(out / '.lock'), pytest.raises(ConflictError, match='another process'):
        encode(source, out, artifact)
    assert encode(source, out, artifact).num_reused == 3


def test_a_damaged_plan_is_an_error_that_names_it(artifact, begun):
    source, out = begun
    (out / 'plan.json').write_text('{"job": {}, "sources": [], "shards": [{}]}')
    with pytest.raises(DataError, match=r"plan\.json' is no description"):
        encode(source, out, artifact)
    assert encode(source, out, artifact, restart=True).num_shards == 3


def test_what_is_not_on_a_node_is_one_error_that_names_it(artifact, begun, tmp_path):
    from dataclasses import replace

    from finetuner.bulk.options import BulkOptions
    from finetuner.bulk.plan import load_plan
    from finetuner.bulk.shard_encoding import ShardEncoder
    from finetuner.excepts import ConfigError

    _, out = begun
    plan = load_plan(out / 'plan.json')
    options = BulkOptions(out, artifact, rows_per_shard=40)

    def result(shard=plan.shards[0], **changed):
        return ShardEncoder(replace(options, **changed), plan.job, 1, elsewhere=True)(shard)

    assert result().num_rows == 40
    for found, what in (
        (result(output=tmp_path / 'none'), 'output'),
        (result(artifact=tmp_path / 'none'), 'artifact'),
        (result(replace(plan.shards[0], source=str(tmp_path / 'none'))), 'input'),
    ):
        with pytest.raises(ConfigError, match=f"the {what} '.*none' is not there on the node"):
            found.check()
    other = shutil.copytree(artifact, tmp_path / 'other')
    (other / 'artifact.json').write_text((other / 'artifact.json').read_text() + '\n')
    with pytest.raises(ValueError, match='was changed since encoding began'):
        result(artifact=other).check()
