"""Loaders: batches in the main process and in workers, and failures that name their Document."""

import gc
import logging
import os
import pickle
import random
import time

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

from finetuner.data import ClassDataset
from finetuner.data.collation import stack_contents
from finetuner.data.contents import content_of
from finetuner.data.datasets import DATASETS
from finetuner.data.documents import load_documents, save_documents
from finetuner.data.loading import (
    LoadingError,
    build_dataset,
    build_loader,
    build_sampler,
)
from finetuner.data.relation_samplers import InstanceSampler, PairSampler, SessionSampler
from finetuner.data.samplers import ClassSampler, RandomSampler, SequentialSampler
from finetuner.excepts import ConfigError, DataError


def number_data(num_docs=12, num_classes=3):
    return DocumentArray(
        [
            Document(
                tensor=np.full((2, 3), i, dtype=np.uint8), tags={'finetuner_label': i % num_classes}
            )
            for i in range(num_docs)
        ]
    )


def loader_of(preprocess_fn=None, num_workers=0, collate_fn=None, docs=None, **options):
    dataset = ClassDataset(docs or number_data(), preprocess_fn)
    sampler = SequentialSampler(len(dataset), 4)
    return build_loader(dataset, sampler, collate_fn, num_workers, **options)


@pytest.mark.parametrize('num_workers', [0, 1, 2])
def test_batches_in_order(num_workers):
    loader = loader_of(num_workers=num_workers)
    assert len(loader) == 3
    for _ in range(2):
        batches = list(loader)
        inputs = torch.cat([inputs for inputs, _ in batches])
        labels = torch.cat([labels for _, labels in batches])
        assert inputs.shape == (12, 2, 3)
        assert inputs.dtype == torch.uint8
        assert inputs[:, 0, 0].tolist() == list(range(12))
        assert labels.dtype == torch.int64
        assert labels.tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize('num_workers', [0, 2])
def test_sampler_decides_what_stands_together(num_workers):
    dataset = ClassDataset(number_data(24, 3))
    sampler, alone = (ClassSampler(dataset.labels, 6, 2, seed=1) for _ in range(2))
    loader = build_loader(dataset, sampler, num_workers=num_workers)
    for epoch in range(3):
        assert sampler.epoch == epoch
        assert [inputs[:, 0, 0].tolist() for inputs, _ in loader] == list(alone)
    sampler.epoch = alone.epoch = 1
    assert [inputs[:, 0, 0].tolist() for inputs, _ in loader] == list(alone)
    for _, labels in loader:
        assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_workers_are_other_processes_and_take_a_lambda():
    pids = set()
    for inputs, _ in loader_of(lambda doc: np.array(os.getpid()), num_workers=1):
        pids |= set(inputs.tolist())
    assert len(pids) == 1
    assert os.getpid() not in pids


@pytest.mark.parametrize('num_workers', [1, 2])
def test_augmentation_in_workers_is_reproducible(num_workers):
    def augment(doc):
        return np.array([random.random(), np.random.rand(), torch.rand(1).item()])

    def epochs(seed):
        loader = loader_of(augment, num_workers=num_workers, seed=seed)
        return [torch.cat([inputs for inputs, _ in loader]) for _ in range(2)]

    first, again, other = epochs(1), epochs(1), epochs(2)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    values = torch.cat(first)
    assert len(torch.unique(values)) == values.numel(), 'workers draw the same numbers'


def _drawn(num_workers, seed=1, state=None, take=None):
    """Two epochs of what an augmentation drew, and the loader's place after `take` batches."""

    def augment(doc):
        return np.array([random.random(), np.random.rand(), torch.rand(1).item()])

    dataset = ClassDataset(number_data(24, 3), augment)
    sampler = ClassSampler(dataset.labels, 6, 2, seed=seed)
    loader = build_loader(dataset, sampler, num_workers=num_workers, seed=seed)
    if state is not None:
        loader.load_state_dict(state)
    place, batches = None, []
    while len(batches) < 8 and loader.state_dict()['epoch'] < 2:
        for inputs, _ in loader:
            batches.append(inputs)
            if len(batches) == take:
                place = loader.state_dict()
    loader.close()
    return batches, place


@pytest.mark.parametrize('num_workers', [1, 2])
def test_augmentation_does_not_depend_on_the_number_of_workers(num_workers):
    alone, several = _drawn(0)[0], _drawn(num_workers)[0]
    assert len(alone) == len(several) == 8
    assert all(torch.equal(*pair) for pair in zip(alone, several, strict=True))


def test_loading_draws_nothing_from_the_generators_of_the_process():
    states = []
    for loads in (False, True):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        if loads:
            _drawn(0)
        states.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ('num_workers', 'take'), [*((0, take) for take in range(1, 9)), (2, 3), (2, 4), (2, 6)]
)
def test_a_loader_goes_on_where_another_one_was(num_workers, take):
    whole, place = _drawn(num_workers, take=take)
    assert place == {'epoch': (take - 1) // 4, 'num_taken': (take - 1) % 4 + 1, 'broken': {}}
    # by another number of workers, too
    rest, _ = _drawn(2 - num_workers if take == 4 else num_workers, state=place)
    assert len(rest) == 8 - take
    assert all(torch.equal(*pair) for pair in zip(rest, whole[take:], strict=True))


def test_a_place_counts_batches_that_were_left_out():
    """A batch of broken files is not seen, but has to be skipped when going on."""

    def preprocess(doc):
        if doc.tensor[0, 0] < 6:
            raise OSError('gone')
        return doc.tensor

    dataset = ClassDataset(number_data(24, 3), preprocess)

    def loader_from(state=None):
        loader = build_loader(dataset, SequentialSampler(24, 4), on_broken='skip')
        if state:
            loader.load_state_dict(state)
        return loader

    loader = loader_from()
    batches = []
    for inputs, _ in loader:
        batches.append(inputs)
        if len(batches) == 2:
            place = loader.state_dict()
    assert place['num_taken'] == 3
    assert len(place['broken']) == 6
    again = loader_from(place)
    rest = [inputs for inputs, _ in again]
    assert [each.tolist() for each in rest] == [each.tolist() for each in batches[2:]]
    assert again.broken == loader.broken


def test_opencv_keeps_to_one_thread_in_workers():
    import cv2

    def num_threads(doc):
        return np.array(cv2.getNumThreads())

    (batch, *_) = loader_of(num_threads, num_workers=1)
    assert batch[0].tolist() == [1, 1, 1, 1]


def fail_at_5(doc):
    if doc.tensor[0, 0] == 5:
        raise RuntimeError('no such colour')
    return doc.tensor


@pytest.mark.parametrize('num_workers', [0, 1])
def test_failing_preprocess_fn_names_document_and_cause(num_workers):
    loader = loader_of(fail_at_5, num_workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    message = str(caught.value)
    assert message == 'Document 5 cannot be preprocessed: RuntimeError: no such colour'
    assert ('fail_at_5' in caught.value.worker_traceback) == bool(num_workers)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_failing_collate_fn_names_documents_and_cause(num_workers):
    def collate(contents):
        raise KeyError('missing')

    with pytest.raises(DataError) as caught:
        list(loader_of(collate_fn=collate, num_workers=num_workers))
    assert str(caught.value) == (
        'collate_fn failed on a batch of 4 (Document 0, Document 1, Document 2, Document 3): '
        "KeyError: 'missing'"
    )


@pytest.mark.parametrize('num_workers', [0, 1])
def test_unlike_shapes_name_documents(num_workers):
    docs = number_data()
    docs[6].tensor = np.zeros((5, 5), np.uint8)
    with pytest.raises(DataError, match=r'^Document 6 became .* \(5, 5\) and Document 4 .*\(2, 3'):
        list(loader_of(docs=docs, num_workers=num_workers))


def test_data_errors_keep_their_words():
    def preprocess(doc):
        raise DataError('picture is empty')

    with pytest.raises(DataError, match=r'^Document 0 cannot be preprocessed: picture is empty$'):
        list(loader_of(preprocess))


def test_workers_end_with_a_failure_and_with_close():
    loader = loader_of(lambda doc: np.array(os.getpid()), num_workers=1)
    inputs, _ = next(iter(loader))
    loader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(inputs[0]), 0)
    assert len(list(loader)) == 3, 'a closed loader starts again'

    pids = []

    def preprocess(doc):
        if doc.tensor[0, 0] == 5:
            raise RuntimeError('no such colour')
        return np.array(os.getpid())

    failing = loader_of(preprocess, num_workers=1)
    start = time.perf_counter()
    with pytest.raises(DataError, match=r'^Document 5 '):
        pids.extend(inputs[0] for inputs, _ in failing)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids[0]), 0)
    gc.collect()
    assert time.perf_counter() - start < 4


def test_loading_error_survives_pickle():
    error = pickle.loads(pickle.dumps(LoadingError('Document 5: why')))
    assert str(error) == 'Document 5: why'


def test_interrupt_is_not_taken_for_a_bad_document():
    def interrupt(doc):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(loader_of(interrupt))


def test_own_collate_fn_gets_the_contents():
    def collate(contents):
        assert type(contents) is list
        return {'sum': sum(int(content.sum()) for content in contents)}

    batches = [inputs for inputs, _ in loader_of(collate_fn=collate)]
    assert batches == [{'sum': 36}, {'sum': 132}, {'sum': 228}]


@pytest.mark.parametrize(
    ('contents', 'dtype'),
    [
        ([np.zeros((2, 2), np.uint8)] * 2, torch.uint8),
        ([np.zeros((2, 2), np.float32)] * 2, torch.float32),
        ([np.zeros((2, 2))] * 2, torch.float32),
        ([torch.zeros(2, 2)] * 2, torch.float32),
        ([np.zeros((2, 2), np.int64)] * 2, torch.int64),
        ([np.zeros((2, 4), np.uint8)[:, ::-2]] * 2, torch.uint8),
        ([[[1, 2], [3, 4]]] * 2, torch.int64),
    ],
)
def test_stacking_keeps_dtypes_but_float64(contents, dtype):
    stacked = stack_contents(contents)
    assert stacked.shape == (2, 2, 2)
    assert stacked.dtype == dtype


@pytest.mark.parametrize('content', ['text', b'bytes', None, {'a': 1}, np.array(['a'])])
def test_what_is_no_array_needs_functions(content):
    with pytest.raises(DataError, match=r'^item 1 became an? \w+, which is no array: give a prep'):
        stack_contents([1, content])


@pytest.mark.filterwarnings('error')
def test_tensors_that_came_from_disk_are_stacked(tmp_path):
    """Protobuf makes read-only arrays, which torch takes only with a warning."""
    save_documents(number_data(), tmp_path / 'docs')
    inputs, _ = next(iter(loader_of(docs=load_documents(tmp_path / 'docs'))))
    assert inputs[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_more_workers_than_cores_are_capped_and_logged(caplog):
    num_cores = len(os.sched_getaffinity(0))
    with caplog.at_level(logging.INFO, logger='finetuner.data'):
        loader = loader_of(num_workers=num_cores + 5)
    assert loader.num_workers == num_cores
    assert f'num_workers={num_cores + 5} capped at the {num_cores} cores' in caplog.text


def test_accelerate_leaves_batches_alone():
    from accelerate import Accelerator

    dataset = ClassDataset(number_data(24, 3))
    sampler = ClassSampler(dataset.labels, 6, 2, seed=1)
    sampler.epoch = 3
    again = ClassSampler(dataset.labels, 6, 2, seed=1)
    again.epoch = 3
    loader = Accelerator(cpu=True).prepare(build_loader(dataset, sampler, num_workers=1))
    for _ in range(2):
        assert [inputs[:, 0, 0].tolist() for inputs, _ in loader] == list(again)


def tagged(content, label, **fields):
    return Document(text=content, tags={'finetuner_label': label}, **fields)


def pair_of(first, second, **tags):
    chunks = [Document(text=first, modality='text'), Document(uri=second, modality='image')]
    return Document(chunks=chunks, tags=tags)


# the contents of each, in order of the items, are a, b, c and d
EVERY_KIND = {
    'class': DocumentArray([tagged('a', 1), tagged('b', 2), tagged('c', 1), tagged('d', 2)]),
    'instance': DocumentArray([Document(text=each) for each in 'abcd']),
    'session': DocumentArray(
        [Document(text='a', matches=[tagged('b', 1), tagged('c', -1), tagged('d', 1)])]
    ),
    'scored_pair': DocumentArray(
        [pair_of('a', 'b', finetuner_score=0.25), pair_of('c', 'd', finetuner_score=1)]
    ),
    'text_image_pair': DocumentArray([pair_of('a', 'b'), pair_of('c', 'd')]),
}


def test_build_dataset_takes_every_kind():
    assert build_dataset(number_data()).labels == [0, 1, 2] * 4
    for kind, docs in EVERY_KIND.items():
        dataset = build_dataset(docs)
        assert dataset.kind == kind
        assert type(dataset) is DATASETS[kind]
        assert [content for content, _ in dataset] == list('abcd')


@pytest.mark.parametrize(
    ('kind', 'sampler', 'labels'),
    [
        ('class', ClassSampler, [0, 1, 0, 1]),
        ('instance', InstanceSampler, [0, 1, 2, 3]),
        ('session', SessionSampler, [[0, 0], [0, 1], [0, -1], [0, 1]]),
        ('scored_pair', PairSampler, [0.25, 0.25, 1, 1]),
        ('text_image_pair', PairSampler, [[0, 0], [0, 1], [1, 0], [1, 1]]),
    ],
)
def test_every_kind_comes_in_batches(kind, sampler, labels):
    dataset = build_dataset(EVERY_KIND[kind])
    drawn = build_sampler(dataset, 4, seed=0)
    assert type(drawn) is sampler
    expected = dict(zip('abcd', labels, strict=True))
    for contents, found in build_loader(dataset, drawn, collate_fn=list):
        assert isinstance(found, torch.Tensor)
        assert found.dtype == (torch.float32 if kind == 'scored_pair' else torch.int64)
        assert found.tolist() == [expected[content] for content in contents]
    if kind != 'class':
        with pytest.raises(ConfigError, match=f"'random' is for class data, .* kind {kind}"):
            build_sampler(dataset, 4, 'random')


def broken_at(*lost):
    def read(doc):
        content = content_of(doc)
        if content in lost:
            raise DataError(f'{content} is broken')
        return content

    return read


@pytest.mark.parametrize('num_workers', [0, 1])
@pytest.mark.parametrize(
    ('kind', 'lost', 'kept'),
    [
        ('class', 'b', 'acd'),
        ('instance', 'd', 'abc'),
        ('session', 'c', 'abd'),  # a match: the others of its session stay
        ('session', 'a', ''),  # the root: nothing is known of its matches
        ('scored_pair', 'b', 'cd'),
        ('text_image_pair', 'c', 'ab'),
        ('class', 'abc', ''),  # what is left alone in its batch teaches nothing
    ],
)
def test_broken_items_are_left_out_with_what_needs_them(kind, lost, kept, num_workers):
    dataset = build_dataset(EVERY_KIND[kind], broken_at(*lost))
    sampler = SequentialSampler(4, 4)
    loader = build_loader(dataset, sampler, list, num_workers, on_broken='skip')
    if kept:
        for _ in range(2):
            ((contents, labels),) = list(loader)
            assert contents == list(kept)
            assert len(labels) == len(kept)
    else:
        with pytest.raises(LoadingError, match='nothing is left to load'):
            list(loader)
    assert list(loader.broken) == [dataset.position_of('abcd'.index(each)) for each in lost]
    for each, reason in zip(lost, loader.broken.values(), strict=True):
        assert f'{each} is broken' in reason
    loader.close()


def test_a_mistake_in_preprocess_fn_is_never_skipped():
    def mistaken(doc):
        return doc.text + 1

    dataset = build_dataset(EVERY_KIND['class'], mistaken)
    with pytest.raises(LoadingError, match='Document 0 cannot be preprocessed: TypeError'):
        list(build_loader(dataset, SequentialSampler(4, 4), list, on_broken='skip'))


def test_build_sampler():
    dataset = ClassDataset(number_data())
    assert isinstance(build_sampler(dataset, 6), ClassSampler)
    assert isinstance(build_sampler(dataset, 6, 'class', 2, seed=1), ClassSampler)
    assert isinstance(build_sampler(dataset, 6, 'random'), RandomSampler)
    with pytest.raises(ValueError, match="did you mean 'random'"):
        build_sampler(dataset, 6, 'randon')
