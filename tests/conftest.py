"""Shared fixtures: seeded pictures, tiny models, a home of one's own, and no network."""

from __future__ import annotations

import io
import ipaddress
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from docarray import Document, DocumentArray
from PIL import Image

# Before torch comes in, here and in every process started from here: on networks this small several
# threads only wait for each other, on a busy machine ten times as long as one takes.
os.environ.setdefault('OMP_NUM_THREADS', '1')

EXAMPLES = Path(__file__).resolve().parent.parent / 'examples'
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))

_CONNECT = socket.socket.connect
_CONNECT_EX = socket.socket.connect_ex
_GETADDRINFO = socket.getaddrinfo


class NetworkUsedError(OSError):
    """A test tried to leave this machine; to what it tests, this is a machine without a network."""


def _is_loopback(host: object) -> bool:
    if host in (None, '', 'localhost', b'localhost'):
        return True
    text = host.decode() if isinstance(host, bytes) else str(host)
    try:
        address = ipaddress.ip_address(text.partition('%')[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse(host: object) -> None:
    if not _is_loopback(host):
        raise NetworkUsedError(f'tests stay on this machine, and this one calls {host!r}')


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Reports travel between processes as UTF-8, which lone surrogates that a test prints are not."""
    report = yield
    report.sections = [
        (title, text.encode('utf-8', 'backslashreplace').decode())
        for title, text in report.sections
    ]
    return report


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Let a test reach loopback addresses and Unix sockets, nothing else."""

    def check(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse(address[0])

    def connect(self, address):
        check(self, address)
        return _CONNECT(self, address)

    def connect_ex(self, address):
        check(self, address)
        return _CONNECT_EX(self, address)

    def getaddrinfo(host, *args, **kwargs):
        _refuse(host)
        return _GETADDRINFO(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, 'connect', connect)
    monkeypatch.setattr(socket.socket, 'connect_ex', connect_ex)
    monkeypatch.setattr(socket, 'getaddrinfo', getaddrinfo)


@pytest.fixture(autouse=True)
def finetuner_home(tmp_path_factory, monkeypatch):
    """Keep each test's runs, data and artifacts in a folder that is thrown away."""
    home = tmp_path_factory.mktemp('home')
    monkeypatch.setenv('FINETUNER_HOME', str(home))
    for name in ('DATABASE_URL', 'ARTIFACTS_URL', 'TOKEN', 'HOST', 'GATEWAY_KEY', 'COLUMNS'):
        monkeypatch.delenv(f'FINETUNER_{name}', raising=False)
    return home


def png(pixels: np.ndarray) -> bytes:
    """Encode `[height, width, 3]` uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format='PNG')
    return buffer.getvalue()


def make_picture_docs(
    num_classes: int = 6, items_per_class: int = 4, size: int = 32, seed: int = 0
) -> DocumentArray:
    """Class data of small PNG blobs: a colour for each class, with noise for each item."""
    random = np.random.default_rng(seed)
    colours = random.integers(40, 216, (num_classes, 3))
    docs = DocumentArray()
    for label, colour in enumerate(colours):
        for item in range(items_per_class):
            noise = random.integers(-40, 40, (size, size, 3))
            pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
            docs.append(
                Document(
                    id=f'{seed}-{label}-{item}', blob=png(pixels), tags={'finetuner_label': label}
                )
            )
    return docs


@pytest.fixture
def picture_docs():
    """24 PNG pictures of 6 classes, in the order of the classes."""
    return make_picture_docs()


def make_vector_docs(
    num_classes: int = 4, items_per_class: int = 8, dimension: int = 6, seed: int = 0
) -> DocumentArray:
    """Class data of float vectors: a centre for each class, far from separated as it comes."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(num_classes, dimension))
    return DocumentArray(
        Document(
            id=f'v{seed}-{label}-{item}',
            tensor=(centres[label] + 0.3 * random.normal(size=dimension)).astype(np.float32),
            tags={'finetuner_label': label},
        )
        for label in range(num_classes)
        for item in range(items_per_class)
    )


@pytest.fixture
def vector_docs():
    """32 float vectors of length 6, of 4 classes."""
    return make_vector_docs()


@pytest.fixture
def tiny_network():
    """A seeded random network from `[batch, 6]` to `[batch, 5]`, with batch normalisation."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 5)
    )


@pytest.fixture
def tiny_classifier():
    """A seeded random convolutional classifier of `[batch, 3, 16, 16]` with 7 classes."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 12),
        torch.nn.Tanh(),
        torch.nn.Linear(12, 7),
    )
