"""Ray is an extra: nothing else needs it, and who asks for it is told its name."""

import json
import os
import subprocess
import sys

import pytest

# as if it were not installed
WITHOUT = 'import sys; sys.modules["ray"] = None\n'
REFUSED = """
import finetuner
from finetuner.excepts import ConfigError
from tests.conftest import make_vector_docs, make_picture_docs
try:
    {call}
except ConfigError as error:
    print(error)
"""
CALLS = {
    'fit': "finetuner.fit('resnet18', make_picture_docs(), device='cpu', "
    "model_options={'weights': 'none', 'input_size': 32})",
    'encode': "finetuner.encode_dataset('texts.jsonl', 'more', model='all-MiniLM-L6-v2', "
    "ray_address='local')",
    'search': "finetuner.bulk.search_shards('out', 'out', 3, ray_address='local')",
}


def run(code, tmp_path, **variables):
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get('PYTHONPATH')]))
    environment = {**os.environ, 'PYTHONPATH': path, **variables}
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT + code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def encoded(tmp_path):
    """Texts, and what they are encoded to by processes of this machine, all without Ray."""
    (tmp_path / 'texts.jsonl').write_text(
        ''.join(json.dumps({'id': str(n), 'text': f'text {n}'}) + '\n' for n in range(5))
    )
    encode = "finetuner.encode_dataset('texts.jsonl', 'out', model='all-MiniLM-L6-v2')"
    assert '(5, 0)' in run(
        f'import finetuner\ndone = {encode}\nprint((done.num_rows, done.num_failed))', tmp_path
    )
    return tmp_path


def test_who_asks_for_ray_is_told_the_extra(encoded):
    asked = {'FINETUNER_LAUNCHER': 'ray', 'FINETUNER_RAY_ADDRESS': 'http://127.0.0.1:8265'}
    for name, call in CALLS.items():
        import_ = 'import finetuner.bulk\n' if name == 'search' else ''
        said = run(import_ + REFUSED.format(call=call), encoded, **(asked if name == 'fit' else {}))
        assert "pip install 'finetuner[ray]'" in said, name
    assert not (encoded / 'home').exists()
