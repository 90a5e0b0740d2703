"""Keys of functions: changed by what changes the result, and by nothing else."""

from __future__ import annotations

import importlib.util
import linecache
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import finetuner
from finetuner.columns.fingerprint import fingerprint

BASE = """
import math
import functools
import numpy as np
from pathlib import Path

SIZE = 3
WEIGHTS = np.arange(4.0)
NAMES = {'a', 'b', 'c', 'd', 'e'}

def helper(x):
    return x + SIZE

def deeper(x):
    return helper(x) * 2

class Thing:
    factor = 2
    def work(self, x):
        return deeper(x) * self.factor

def made(n):
    def inner(x):
        return x * n
    return inner

def even(n):
    return n == 0 or odd(n - 1)

def odd(n):
    return n != 0 and even(n - 1)

@functools.cache
def cached(x):
    return x + 1

def column(x, y=1, *, z=2):
    '''What it is.'''
    # a comment
    total = Thing().work(x) + y + z + math.sqrt(4)
    return [total * w for w in WEIGHTS if str(w) not in NAMES]

def recursive(x):
    return even(x)

def calls_cached(x):
    return cached(x)

three = made(3)
lambdas = [lambda x: x + 1, lambda x: x + 2]
"""


def load(text, tmp_path, name='column', module='columns_module'):
    """A function of a module that says this."""
    path = tmp_path / f'{module}_{abs(hash(text))}.py'
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(module, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)


@pytest.mark.parametrize(
    ('old', 'new'),
    [
        ('    # a comment\n', ''),
        ("'''What it is.'''", "'''What else it is.'''"),
        ('total = Thing()', 'total = (Thing())'),
        ('def column(x, y=1', 'def column(x: int, y: int=1'),
        ('\ndef helper', '\n\n\n\ndef helper'),
        ("NAMES = {'a', 'b', 'c', 'd', 'e'}", "NAMES = {'e', 'b', 'c', 'd', 'a'}"),
        ('three = made(3)', 'three = made(4)'),
    ],
)
def test_what_changes_no_result_changes_no_key(old, new, tmp_path):
    assert old in BASE
    before = fingerprint(load(BASE, tmp_path))
    assert fingerprint(load(BASE.replace(old, new, 1), tmp_path)) == before


@pytest.mark.parametrize(
    ('old', 'new'),
    [
        ('SIZE = 3', 'SIZE = 4'),
        ('SIZE = 3', 'SIZE = 3.0'),
        ('np.arange(4.0)', 'np.arange(5.0)'),
        ('np.arange(4.0)', 'np.arange(4)'),
        ("'d', 'e'}", "'d', 'f'}"),
        ('return x + SIZE', 'return x - SIZE'),
        ('helper(x) * 2', 'helper(x) * 3'),
        ('factor = 2', 'factor = 3'),
        ('return deeper(x) * self', 'return deeper(x) + self'),
        ('y=1, *', 'y=2, *'),
        ('z=2)', 'z=3)'),
        ('math.sqrt', 'math.exp'),
        ('if str(w)', 'if repr(w)'),
    ],
)
def test_what_changes_a_result_changes_the_key(old, new, tmp_path):
    assert old in BASE
    before = fingerprint(load(BASE, tmp_path))
    assert fingerprint(load(BASE.replace(old, new, 1), tmp_path)) != before


@pytest.mark.parametrize(
    ('name', 'old', 'new', 'changes'),
    [
        ('three', 'made(3)', 'made(4)', True),
        ('three', 'return x * n', 'return x / n', True),
        ('recursive', 'n != 0', 'n > 0', True),
        ('recursive', 'SIZE = 3', 'SIZE = 4', False),
        ('calls_cached', 'return x + 1\n\ndef column', 'return x + 2\n\ndef column', True),
    ],
)
def test_closures_circles_and_wrapped_functions(name, old, new, changes, tmp_path):
    assert old in BASE
    before = fingerprint(load(BASE, tmp_path, name))
    after = fingerprint(load(BASE.replace(old, new, 1), tmp_path, name))
    assert (after != before) is changes


def test_another_process_finds_the_same_key(tmp_path):
    path = tmp_path / 'written.py'
    path.write_text(BASE)
    script = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        import written
        from finetuner.columns.fingerprint import fingerprint
        print(fingerprint(written.column), fingerprint(written.three))
        """
    )
    told = {
        subprocess.run(
            [sys.executable, '-c', script, str(tmp_path)],
            env={'PYTHONHASHSEED': seed, 'PYTHONPATH': ':'.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ('1', '2', '3')
    }
    assert len(told) == 1


def test_code_that_runs_counts_not_the_file_that_was_edited_since(tmp_path):
    function = load(BASE, tmp_path, module='edited')
    before = fingerprint(function)
    edited = BASE.replace('+ y + z', '+ y - z')
    (tmp_path / f'edited_{abs(hash(BASE))}.py').write_text(edited)
    linecache.checkcache()
    old_code = fingerprint(function)
    new_code = fingerprint(load(edited, tmp_path, module='edited2'))
    # a process that goes on finds its values, whatever is edited meanwhile
    assert old_code == before
    assert before != new_code


def test_a_module_that_is_imported_again_counts_by_its_file_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    path = tmp_path / 'again.py'
    keys = []
    # what is read of a file is remembered by its name
    for number, text in enumerate(
        [BASE, f'# a comment\n{BASE}', BASE.replace("'''What", "'''Who")]
    ):
        path.write_text(text)
        os.utime(path, (number, number))
        spec = importlib.util.spec_from_file_location('again', path)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        keys.append(fingerprint(loaded.column))
    assert keys == [keys[0]] * 3


def test_nothing_of_finetuner_itself_counts(tmp_path):
    # as it does when it is not installed, but runs from a folder
    copy = tmp_path / 'finetuner'
    shutil.copytree(
        Path(finetuner.__file__).parent, copy, ignore=shutil.ignore_patterns('__pycache__')
    )
    (tmp_path / 'uses_files.py').write_text(
        'from finetuner.columns import File\n\ndef column(x):\n    return File.make_tmp(x)\n'
    )
    script = (
        'import finetuner, uses_files\nfrom finetuner.columns.fingerprint import fingerprint\n'
        'print(finetuner.__file__, fingerprint(uses_files.column))'
    )
    told = []
    for text in ('', '\n\nFile.added = lambda self: 5\n'):
        with (copy / 'columns' / 'files.py').open('a') as file:
            file.write(text)
        environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
        command = [sys.executable, '-c', script]
        told.append(subprocess.check_output(command, env=environment, cwd=tmp_path).split())
    assert told[0][0].decode().startswith(str(tmp_path))
    assert told[0] == told[1]


def test_two_functions_on_one_line_and_functions_without_a_file(tmp_path):
    one, two = load(BASE, tmp_path, 'lambdas')
    assert fingerprint(one) != fingerprint(two)
    namespace: dict = {}
    exec('def typed(x):\n    return x + 1', namespace)
    first = fingerprint(namespace['typed'])
    exec('def typed(x):\n    # the same\n    return x + 1', namespace)
    assert fingerprint(namespace['typed']) == first
    exec('def typed(x):\n    return x + 2', namespace)
    assert fingerprint(namespace['typed']) != first


def test_models_count_by_their_weights():
    torch = pytest.importorskip('torch')
    model = torch.nn.Linear(2, 2)

    def embed(x):
        return model(x)

    before = fingerprint(embed)
    assert fingerprint(embed) == before
    with torch.no_grad():
        model.weight += 1
    assert fingerprint(embed) != before


def test_helpers_of_other_modules_of_ones_own_count(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = 'import own_helpers\n\ndef column(x):\n    return own_helpers.twice(x)\n'
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    keys = []
    for factor in (2, 3, 2):
        (tmp_path / 'own_helpers.py').write_text(f'def twice(x):\n    return x * {factor}\n')
        sys.modules.pop('own_helpers', None)
        importlib.invalidate_caches()
        keys.append(fingerprint(load(text, tmp_path, module='uses_helpers')))
    assert keys[0] == keys[2] != keys[1]
