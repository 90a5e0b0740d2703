"""The file of a checkpoint: whole or not taken, private, without pickle."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from finetuner.data.randomness import drawing_from, random_state, set_random_state
from finetuner.excepts import CheckpointError
from finetuner.training.checkpointing import (
    SUMMARY,
    plain_attributes,
    plain_state,
    read_checkpoint,
    set_plain_attributes,
    write_checkpoint,
)

STATE = {
    'weights': {'a': torch.arange(6.0).reshape(2, 3), 3: torch.tensor(1, dtype=torch.int64)},
    'values': [1, 2.5, float('inf'), None, True, 'text', ('tuple', (1, 2))],
    ('a', 1): {},
}


def files_of(directory):
    return sorted(path.name for path in directory.iterdir())


def payload(directory):
    return directory / json.loads((directory / SUMMARY).read_text())['file']


def test_what_is_written_is_read(tmp_path):
    directory = tmp_path / 'deep' / 'checkpoint'
    assert read_checkpoint(directory) is None
    write_checkpoint(directory, STATE, {'step': 7})
    found = read_checkpoint(directory)
    assert torch.equal(found['weights']['a'], STATE['weights']['a'])
    assert found['weights'][3] == 1
    assert found['values'] == STATE['values']
    assert found['a', 1] == {}
    assert json.loads((directory / SUMMARY).read_text())['step'] == 7
    write_checkpoint(directory, {'step': 8}, {'step': 8})
    assert read_checkpoint(directory) == {'step': 8}
    assert len(files_of(directory)) == 2, 'the one before is gone'


def test_it_is_for_its_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        write_checkpoint(tmp_path / 'checkpoint', STATE, {})
    finally:
        os.umask(before)
    assert (tmp_path / 'checkpoint').stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / 'checkpoint').iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path.name


def cut(directory):
    with payload(directory).open('rb+') as file:
        file.truncate(payload(directory).stat().st_size - 1)


def flip(directory):
    content = bytearray(payload(directory).read_bytes())
    content[len(content) // 2] ^= 1
    payload(directory).write_bytes(content)


def other_version(directory):
    summary = json.loads((directory / SUMMARY).read_text())
    (directory / SUMMARY).write_text(json.dumps({**summary, 'version': 999}))


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (cut, 'missing or incomplete'),
        (flip, 'hash differs'),
        (lambda directory: payload(directory).unlink(), 'missing or incomplete'),
        (lambda directory: (directory / SUMMARY).write_text('{"version": 1, "fi'), 'no JSON'),
        (lambda directory: (directory / SUMMARY).write_text('[]'), 'another version'),
        (other_version, 'another version'),
    ],
)
def test_a_damaged_one_is_not_taken(tmp_path, damage, message):
    write_checkpoint(tmp_path / 'checkpoint', STATE, {})
    damage(tmp_path / 'checkpoint')
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / 'checkpoint')


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_it_reads_no_file_outside_and_executes_nothing(tmp_path):
    import hashlib

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'was here'),)

    content = pickle.dumps(Evil())
    (tmp_path / 'outside.pt').write_bytes(content)
    directory = tmp_path / 'checkpoint'
    write_checkpoint(directory, STATE, {})
    summary = json.loads((directory / SUMMARY).read_text())
    summary |= {'num_bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}
    (directory / SUMMARY).write_text(json.dumps({**summary, 'file': '../outside.pt'}))
    with pytest.raises(CheckpointError, match='missing'):
        read_checkpoint(directory)
    payload_path = directory / summary['file']
    payload_path.write_bytes(content)
    (directory / SUMMARY).write_text(json.dumps(summary))
    with pytest.raises(CheckpointError, match='cannot be read'):
        read_checkpoint(directory)
    assert not (tmp_path / 'was here').exists()


# writes checkpoints as fast as it can, each of equal numbers
WRITER = """
import sys, torch
from pathlib import Path
from finetuner.training.checkpointing import write_checkpoint
for number in range(1_000_000):
    state = {'number': number, 'weights': torch.full((300_000,), float(number))}
    write_checkpoint(Path(sys.argv[1]), state, {'step': number})
    print(number, flush=True)
"""


def test_killed_at_any_moment_the_last_one_is_whole(tmp_path):
    random = np.random.default_rng(0)
    writer = subprocess.Popen(
        [sys.executable, '-c', WRITER, str(tmp_path / 'x')], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == '0\n'
    # copies of what a process sees that is stopped at this moment, as a killed one leaves it
    for _ in range(15):
        time.sleep(float(random.uniform(0, 0.03)))
        writer.send_signal(signal.SIGSTOP)
        while psutil.Process(writer.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        found = read_checkpoint(tmp_path / 'x')
        assert found is not None
        assert (found['weights'] == found['number']).all()
        writer.send_signal(signal.SIGCONT)
    writer.kill()
    told = int(writer.stdout.read().split()[-1])
    writer.wait()
    found = read_checkpoint(tmp_path / 'x')
    assert found['number'] in (told, told + 1)
    # what it left unfinished goes with the next
    write_checkpoint(tmp_path / 'x', {'number': -1}, {})
    assert len(files_of(tmp_path / 'x')) == 2


@pytest.mark.parametrize('num_bytes', [1_000, 50_000, 399_000])
def test_a_full_disk_keeps_the_one_before(tmp_path, num_bytes):
    write_checkpoint(tmp_path, {'number': 1}, {})
    before = files_of(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        with pytest.raises(CheckpointError, match='cannot be written'):
            write_checkpoint(tmp_path, {'number': 2, 'weights': torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(tmp_path) == before
    assert read_checkpoint(tmp_path) == {'number': 1}


def test_a_state_that_could_not_be_read_again_is_refused(tmp_path):
    state = {'callbacks': [('Mine', {'best': np.float32(0.5), 'rows': np.zeros(3)})]}
    with pytest.raises(TypeError, match=r"state\['callbacks'\]\[0\]\[1\]\['rows'\] is a ndarray"):
        write_checkpoint(tmp_path, state, {})
    assert plain_state({'best': np.float32(0.5)}) == {'best': 0.5}
    assert type(plain_state(np.float64(0.5))) is float
    assert not plain_state(torch.nn.Parameter(torch.zeros(2))).requires_grad


def test_numbers_beside_the_state_dict_are_kept():
    def build():
        inner = torch.nn.Linear(2, 2)
        inner.fitted, inner.queue = False, torch.zeros(2)
        return torch.nn.Sequential(inner, torch.nn.ReLU())

    one, other = build(), build()
    one[0].fitted, one[0].queue = True, torch.ones(3)
    set_plain_attributes(other, plain_attributes(one), torch.device('cpu'))
    assert other[0].fitted is True
    assert other[0].queue.tolist() == [1, 1, 1]
    assert other[0].in_features == 2


def test_random_numbers_go_on_where_they_were():
    import random

    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(3).tolist()

    draw()
    saved = random_state()
    expected = [draw() for _ in range(3)]
    set_random_state(plain_state(saved))
    assert [draw() for _ in range(3)] == expected


def test_drawing_from_a_key_depends_on_it_alone():
    import random

    def draw(key):
        with drawing_from(key):
            return random.random(), np.random.rand(), torch.rand(1).item()

    torch.manual_seed(0)
    assert draw((1, 2, 3)) == draw((1, 2, 3))
    drawn = [draw(key) for key in ((1, 2, 3), (1, 3, 2), (0, 0, 0), (0, 0, 1), (2**40, 0, 0))]
    assert len({value for values in drawn for value in values}) == 15
    after = torch.rand(1).item()
    torch.manual_seed(0)
    assert torch.rand(1).item() == after
