"""`finetuner encode` on real processes: killed at any moment, with workers, and on Ray."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from typer.main import get_command

import finetuner
from finetuner.bulk import open_encoded
from finetuner.inference import load_engine
from tests.integration.serving import REPOSITORY
from tests.integration.test_documented import blocks
from tests.ray_nodes import RayNodes
from tests.unit.bulk_cases import (
    files_of,
    some_texts,
    write_parquet,
    write_picture_artifact,
    write_text_artifact,
)

TEXTS = some_texts(1500, seed=3)

# real processes, and once a Ray cluster, on machines that do other things as well
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope='module')
def artifact(tmp_path_factory):
    return write_text_artifact(tmp_path_factory.mktemp('bulk'))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    # a row that fails, so that its list is compared, too
    texts = ['' if n == 700 else text for n, text in enumerate(TEXTS)]
    return write_parquet(tmp_path_factory.mktemp('texts') / 'a.parquet', text=texts)


@pytest.fixture(scope='module')
def whole(artifact, source, tmp_path_factory):
    """What is written where nobody is killed."""
    out = tmp_path_factory.mktemp('whole') / 'out'
    finetuner.encode_dataset(source, out, artifact, rows_per_shard=10)
    return files_of(out)


def command(*arguments):
    return [sys.executable, '-m', 'finetuner.cli', 'encode', *map(str, arguments)]


def run(*arguments, **options):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=REPOSITORY, timeout=600, **options
    )


def begin(*arguments):
    return subprocess.Popen(command(*arguments), cwd=REPOSITORY, stdout=subprocess.PIPE)


def num_done(out):
    return len(list(out.glob('part-*.json')))


def wait_for(process, out, number):
    while process.poll() is None and num_done(out) < number:
        time.sleep(0.01)
    assert process.returncode is None


def killed(process):
    """Kill it, and wait for its workers to end with it."""
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_killed_at_random_it_goes_on_to_the_same_bytes(artifact, source, whole, tmp_path):
    out = tmp_path / 'out'
    given = ('-i', source, '-o', out, '--artifact', artifact, '--rows-per-shard', 10, '--json')
    moments, stood = random.Random(0), [0]
    for _ in range(3):
        process = begin(*given)
        wait_for(process, out, stood[-1] + 1)
        time.sleep(moments.uniform(0, 0.15))
        killed(process)
        # nothing says that all is there
        assert not (out / 'manifest.json').exists()
        stood.append(num_done(out))
    done = run(*given)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert 3 <= stood[-1] < 150
    assert summary['num_reused'] in (stood[-1], stood[-1] - 1)
    assert (summary['num_rows'], summary['num_failed']) == (1500, 1)
    assert files_of(out) == whole


def test_workers_that_are_killed_are_replaced_and_end_with_their_parent(
    artifact, source, whole, tmp_path
):
    out = tmp_path / 'out'
    given = ('-i', source, '-o', out, '--artifact', artifact, '--rows-per-shard', 10)
    process = begin(*given, '--workers', 2)
    wait_for(process, out, 5)
    killed(process)
    process = begin(*given, '--workers', 2, '--json')
    wait_for(process, out, num_done(out) + 10)
    psutil.Process(process.pid).children()[0].send_signal(signal.SIGKILL)
    told, _ = process.communicate(timeout=400)
    assert process.returncode == 0
    assert json.loads(told)['missing'] == []
    assert files_of(out) == whole


def test_pictures_by_the_command_are_those_of_encode(tmp_path):
    artifact = write_picture_artifact(tmp_path)
    pictures = shutil.copytree(REPOSITORY / 'examples' / 'emoji' / 'test', tmp_path / 'emoji')
    names = sorted(pictures.glob('*/*.webp'))
    for path in names[100:]:
        path.unlink()
    names[7].write_bytes(b'RIFF')
    out = tmp_path / 'out'
    given = ('-i', pictures, '-o', out, '--artifact', artifact, '--format', 'numpy')
    done = run(*given, '--rows-per-shard', 30)
    assert done.returncode == 0, done.stderr
    assert '99 embeddings in 4 shards, 1 rows failed' in ' '.join(done.stdout.split())
    good = [path for path in names[:100] if path != names[7]]
    expected = finetuner.encode(load_engine(artifact, is_onnx=True), [str(path) for path in good])
    found = list(open_encoded(out))
    assert [name for ids, _ in found for name in ids] == [
        path.relative_to(tmp_path).as_posix() for path in good
    ]
    np.testing.assert_allclose(np.concatenate([e for _, e in found]), expected, atol=1e-6)
    over = run(*given, '--rows-per-shard', 30, '--max-failed', '0.5%')
    assert over.returncode == 2
    assert '1 of 100 rows failed' in over.stderr


def test_an_input_that_cannot_be_read_gives_exit_code_1(artifact, source, tmp_path):
    (tmp_path / 'b.parquet').write_bytes(b'none')
    given = ('-i', source, '-i', tmp_path / 'b.parquet', '-o', tmp_path / 'out')
    done = run(*given, '--artifact', artifact)
    assert done.returncode == 1
    assert 'missing: ' in done.stderr
    assert 'b.parquet' in done.stderr
    assert '1,499 embeddings' in done.stdout


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['-i', 'a.parquet'], '--output'),
        (['-i', 'a.parquet', '-o', 'out'], 'one of artifact'),
        (['-o', 'out'], 'MODEL DATA OUTPUT'),
        (['-i', 'a.parquet', '-o', 'out', '--artifact', 'a', '--max-failed', 'x'], '--max-failed x'),
        (['-i', 'a.parquet', '-o', 'out', '--artifact', 'a', '--onnx'], '--engine onnx'),
    ],
)  # fmt: skip
def test_what_the_command_does_not_take(arguments, said, tmp_path, capsys, monkeypatch):
    from finetuner import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['finetuner', 'encode', *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_guide_runs_as_it_is_written(artifact, tmp_path, monkeypatch, capsys):
    from finetuner import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'articles').mkdir()
    write_parquet(tmp_path / 'data' / 'a.parquet', text=TEXTS[:5])
    more = {'title': ['one', 'two'], 'year': [1999, 2000]}
    write_parquet(tmp_path / 'articles' / 'a.parquet', url=['x', 'y'], body=TEXTS[:2], **more)
    record = {'url': 'z', 'body': 'red', 'title': 'three', 'year': 2001}
    (tmp_path / 'more.jsonl').write_text(json.dumps(record))
    commands = [
        shlex.split(line.replace('emoji@latest', str(artifact)))
        for block in blocks('docs/encoding.md', 'bash')
        for line in block.replace('\\\n', ' ').splitlines()
    ]
    on_ray = [arguments for arguments in commands if '--ray' in arguments]
    assert (len(commands), len(on_ray)) == (4, 1)
    for arguments in commands:
        if arguments in on_ray:
            # a cluster is what another test has: here, that these are its options
            get_command(cli.app).commands['encode'].make_context('encode', arguments[2:])
            continue
        shutil.rmtree('out', ignore_errors=True)
        monkeypatch.setattr(sys, 'argv', arguments)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert json.loads((tmp_path / 'out' / 'manifest.json').read_text())['num_failed'] == 0
    (code,) = blocks('docs/encoding.md', 'python')
    exec(compile(code.replace('emoji@latest', str(artifact)), 'docs/encoding.md', 'exec'), {})
    assert capsys.readouterr().out.splitlines()[-1] == '5 (5, 16)'


def test_a_ray_cluster_of_which_a_node_is_killed_writes_the_same_bytes(
    artifact, source, whole, tmp_path
):
    out = tmp_path / 'out'
    options = ('-i', source, '-o', out, '--artifact', artifact, '--rows-per-shard', 10, '--json')
    with RayNodes(has_jobs=False, head_cpus=1) as cluster:
        node = cluster.add(1)
        begun = subprocess.Popen(
            command(*options, '--workers', 2, '--ray', cluster.address),
            env={**os.environ, **cluster.environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        while len(list(out.glob('part-*.json'))) < 3:
            assert begun.poll() is None, 'it ended before a node could be killed'
            time.sleep(0.02)
        cluster.kill(node)
        cluster.add(1)
        said, _ = begun.communicate(timeout=500)
    assert begun.returncode == 0
    assert json.loads(said)['missing'] == []
    assert files_of(out) == whole
