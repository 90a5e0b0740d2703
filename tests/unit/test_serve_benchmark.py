"""What the benchmark of serving makes of what its clients saw, without a server."""

import importlib
import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks; what that brings in is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, 'path', [str(BENCHMARKS), *sys.path])
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], '__file__', '')):
            del sys.modules[name]


def test_a_request_counts_by_its_share_of_the_window(load):
    speed = load('serve_clients').documents_per_second
    # inside; half in at the beginning; a quarter in at the end; outside on either side
    seen = [(11.0, 2.0), (9.0, 2.0), (19.0, 4.0), (5.0, 5.0), (20.0, 1.0)]
    assert speed(seen, 10, 20, num_documents=8) == pytest.approx((1 + 0.5 + 0.25) * 8 / 10)
    assert speed([], 10, 20, num_documents=8) == 0


def test_the_edges_of_the_window_do_not_matter_however_long_requests_take(load):
    speed = load('serve_clients').documents_per_second
    # 32 clients one after another behind one that answers 10 a second: each waits 3.2 s
    seen = [(0.1 * i, 3.2) for i in range(400)]
    assert speed(seen, 5, 9, 1) == pytest.approx(10, rel=0.02)
    # one client, whose request is longer than the window
    assert speed([(0.0, 20.0)], 5, 9, 64) == pytest.approx(64 / 20)


def test_latencies_are_of_requests_on_their_way_in_the_window(load):
    seen = [(1.0, 1.0), (9.5, 1.0), (11.0, 2.0), (19.9, 7.0), (20.0, 3.0)]
    assert load('serve_clients').latencies(seen, 10, 20) == [1.0, 2.0, 7.0]


def test_percentiles_are_values_that_were_seen(load):
    percentile = load('serve_clients').percentile
    values = [float(i) for i in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (50, 99)
    assert percentile(values, 1) == 100
    assert percentile([3.0], 0.01) == 3
    for wrong in ([], [1.0]):
        with pytest.raises(ValueError, match='share'):
            percentile(wrong, 0.5 if not wrong else 0.0)


def test_texts_are_the_same_each_time_and_of_mixed_lengths(load):
    texts = load('serve_work').generate_texts()
    assert texts == load('serve_work').generate_texts()
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) <= 4
    assert max(lengths) >= 40


def test_the_limit_keeps_to_its_tokens_and_loses_no_text(load, tmp_path):
    from finetuner.models.zoo import backbone_tokenizer, get_backbone

    tokenizer = backbone_tokenizer(get_backbone('all-MiniLM-L6-v2'))
    file = tmp_path / 'tokenizer.json'
    file.write_text(tokenizer.to_str())
    limit = load('serve_limit')
    texts = load('serve_work').generate_texts()
    batches = limit.prepare_texts(texts, file, 512)(range(len(texts)))
    assert sorted(i for _, positions in batches for i in positions) == list(range(len(texts)))
    for inputs, positions in batches:
        assert inputs['input_ids'].shape == inputs['attention_mask'].shape
        assert inputs['input_ids'].size <= 512
        assert len(positions) == len(inputs['input_ids'])
        assert inputs['attention_mask'].sum(1).min() >= 3


def test_smallest_cosine_is_that_of_the_row_farthest_off(load):
    rows = np.array([[1.0, 0], [0, 2.0]])
    found = load('serve_contestants').smallest_cosine(rows, np.array([[3.0, 0], [1.0, 1.0]]))
    assert found == pytest.approx(2**-0.5)


class _Slow(BaseHTTPRequestHandler):
    """Answers each request after a while, with so many bytes."""

    protocol_version = 'HTTP/1.1'
    num_bytes = 100

    def do_POST(self):
        self.rfile.read(int(self.headers['content-length']))
        time.sleep(0.02)
        self.send_response(200)
        self.send_header('content-length', str(self.num_bytes))
        self.end_headers()
        self.wfile.write(b'x' * self.num_bytes)

    def log_message(self, *_):
        pass


def _run_clients(tmp_path, port, least_bytes):
    requests = tmp_path / 'requests'
    requests.mkdir()
    (requests / '0').write_bytes(b'{}')
    job = {
        'protocol': 'http',
        'port': port,
        'path': '/encode',
        'folder': str(requests),
        'num_clients': 3,
        'first': 0,
        'least_bytes': least_bytes,
    }
    process = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / 'serve_clients.py')],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(json.dumps(job) + '\n')
    process.stdin.flush()
    assert process.stdout.readline() == 'ready\n'
    begin = time.monotonic()
    out, errors = process.communicate(f'{begin} {begin + 0.5}\n', timeout=60)
    return begin, process.returncode, out, errors


@pytest.fixture
def slow_server():
    with ThreadingHTTPServer(('127.0.0.1', 0), _Slow) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_clients_ask_side_by_side_until_the_end(tmp_path, slow_server):
    begin, code, out, errors = _run_clients(tmp_path, slow_server, least_bytes=100)
    assert code == 0, errors
    assert not errors
    seen = json.loads(out)
    starts = [started for started, _ in seen['requests']]
    assert begin <= min(starts)
    assert max(starts) < begin + 0.5
    assert all(seconds >= 0.02 for _, seconds in seen['requests'])
    # three at a time from the beginning
    assert sorted(starts)[2] < min(started + seconds for started, seconds in seen['requests'])
    assert seen['cpu_seconds'] > 0


def test_an_answer_too_short_to_hold_embeddings_stops_the_clients(tmp_path, slow_server):
    _, code, out, errors = _run_clients(tmp_path, slow_server, least_bytes=101)
    assert code != 0
    assert not out
    assert 'answer 200' in errors


STACKS = """\
thread (1): MainThread;main (finetuner/cli.py:65);run_forever (asyncio/base_events.py:607);_run (asyncio/events.py:80) 5
thread (1): MainThread;main (finetuner/cli.py:65);run_forever (asyncio/base_events.py:607);select (selectors.py:468) 2
thread (1): MainThread;main (finetuner/cli.py:65);EpollSelector.select (selectors.py:468) 90
thread (2): encode_0;_worker (concurrent/futures/thread.py:81) 80
thread (2): encode_0;_worker (concurrent/futures/thread.py:83);run (onnxruntime/capi/x.py:395) 30
thread (3): pool;Thread.run (threading.py:982);read (finetuner/inputs.py:9);_decode_jpeg (finetuner/images.py:192) 7
thread (3): pool;_worker (concurrent/futures/thread.py:83);_encode (finetuner/server/encoder.py:9);merge (mystery/x.py:1) 3
"""


def test_a_stack_belongs_to_its_innermost_known_function_and_waiting_is_no_work(load):
    found = load('serve_profile').read_stacks(STACKS)
    assert found == {'event loop': 7, 'inference': 30, 'decode and resize': 7, 'our server': 3}


def test_cpu_is_divided_as_the_samples_are_but_for_threads_without_python(load):
    profile = load('serve_profile')
    process = profile.Watched.__new__(profile.Watched)
    process.cpu_seconds = 10.0
    process.native = profile.Counter({'inference': 4.0})
    samples = profile.Counter({'inference': 2, 'Documents': 1})
    assert profile.by_stage(process, samples) == pytest.approx({'inference': 8, 'Documents': 2})
