"""The Dockerfile as far as it can be read without an engine; tests/try_image.sh builds it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / 'Dockerfile').read_text()
IGNORED = (ROOT / '.dockerignore').read_text().split('\n')
# lines that a backslash ends are one
INSTRUCTIONS = re.sub(r'\\\n\s*', ' ', re.sub(r'(?m)^#.*\n', '', DOCKERFILE)).strip().splitlines()


def stage(name):
    start = next(i for i, each in enumerate(INSTRUCTIONS) if each.endswith(f' AS {name}'))
    rest = INSTRUCTIONS[start + 1 :]
    length = next((i for i, each in enumerate(rest) if each.startswith('FROM ')), len(rest))
    return rest[:length]


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).parent / 'hadolint'
    done = subprocess.run([hadolint, ROOT / 'Dockerfile'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('name', ['base', 'executor', 'service'])
def test_nobody_is_root_and_no_secret_is_in_it(name):
    users = [each for each in stage('base') if each.startswith('USER ')]
    assert users == ['USER 1000:1000'], 'a number, which Kubernetes can compare with 0'
    for each in stage(name):
        assert not re.search(r'(?i)(token|password|secret)\w*=', each), each


def test_all_that_is_copied_is_there_and_sent():
    copied = {
        source
        for each in INSTRUCTIONS
        if each.startswith('COPY ') and '--from=' not in each
        for source in each.split()[1:-1]
    }
    assert copied >= {'requirements.txt', 'finetuner', 'executors', 'flows', 'config.yml'}
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f'!{source}' in IGNORED, source
    assert '*' in IGNORED, 'all else stays outside: data, homes, the history'


def test_the_last_stage_serves_and_the_one_before_is_an_executor():
    names = re.findall(r'(?m)^FROM .* AS (\w+)$', DOCKERFILE)
    assert names[-2:] == ['executor', 'service']
    entry = 'ENTRYPOINT ["jina", "executor", "--uses", "config.yml"]'
    assert entry in stage('executor')
    assert any('/health/ready' in each for each in stage('service'))
    assert any(each.startswith('HEALTHCHECK') for each in stage('service'))
    assert 'VOLUME /data' in stage('base')
    assert any('FINETUNER_HOME=/data' in each for each in stage('base'))
