"""`fit(model=<nn.Module>, train_data=ShardedBatches(...))`: the steps of a loop by hand."""

import copy

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray
from pytorch_metric_learning.losses import TripletMarginLoss

import finetuner
from finetuner.data import ShardedBatches, ShardedDocuments
from finetuner.data.stored.storing import save_documents
from finetuner.excepts import ConfigError, DataError
from finetuner.training.trainer import BaseCallback

LENGTH, NUM_CLASSES = 6, 4


def vector(doc):
    return np.array(doc.tensor, dtype=np.float32)


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    random = np.random.default_rng(0)
    for number in range(4):
        docs = DocumentArray(
            Document(
                tensor=random.normal(size=LENGTH).astype(np.float32),
                tags={'finetuner_label': f'c{row % NUM_CLASSES}'},
            )
            for row in range(30)
        )
        save_documents(docs, folder / f'{number}.docs')
    return str(folder / '*.docs')


def stream(shards, num_ranks=1, **options):
    options = {'preprocess_fn': vector, 'num_items_per_class': 4, **options}
    documents = ShardedDocuments(shards, 0, num_ranks, seed=3, shuffle_buffer=40)
    return ShardedBatches(documents, 16, **options)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(LENGTH, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def fit(model, batches, **options):
    options = {'epochs': 3, 'loss': 'TripletMarginLoss', 'configure_optimizer': sgd, **options}
    return finetuner.fit(model, batches, **options)


class Losses(BaseCallback):
    def __init__(self):
        self.of_batches, self.of_epochs = [[]], []

    def on_train_batch_end(self, trainer):
        self.of_batches[-1].append(trainer.state.loss)

    def on_epoch_end(self, trainer):
        self.of_epochs.append(trainer.state.train_loss)
        self.of_batches.append([])


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('num_batches', [None, 5])
def test_the_model_is_that_of_a_loop_by_hand(shards, num_batches, num_workers):
    expected, losses = network(), Losses()
    loader = stream(shards, num_batches=num_batches).loader(num_workers)
    optimizer, loss = sgd(expected), TripletMarginLoss()
    for _ in range(3):
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss(expected(inputs), labels).backward()
            optimizer.step()
    found = fit(
        network(),
        stream(shards, num_batches=num_batches),
        num_workers=num_workers,
        callbacks=[losses],
    )
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, atol=1e-6, rtol=0)
    means = [np.mean(batches) for batches in losses.of_batches[:-1]]
    np.testing.assert_allclose(losses.of_epochs, means, rtol=1e-6)
    assert num_batches is None or {len(each) for each in losses.of_batches[:-1]} == {5}


def test_validation_data_is_read_as_the_stream_is(shards):
    seen = []

    class Values(BaseCallback):
        def on_val_end(self, trainer):
            seen.append(trainer.state.val_loss)

    fit(network(), stream(shards), eval_data=shards, epochs=2, callbacks=[Values()])
    assert len(seen) == 2
    assert np.isfinite(seen).all()


def test_losses_with_weights_of_classes_need_the_classes(shards):
    with pytest.raises(ConfigError, match='give ShardedBatches classes'):
        fit(network(), stream(shards), loss='ArcFaceLoss')
    classes = [f'c{number}' for number in range(NUM_CLASSES)]
    before = network()
    after = fit(copy.deepcopy(before), stream(shards, classes=classes), loss='ArcFaceLoss')
    assert not torch.equal(before[0].weight, after[0].weight)


@pytest.mark.parametrize(
    'given',
    [
        {'batch_size': 8},
        {'preprocess_fn': vector},
        {'collate_fn': torch.tensor},
        {'num_items_per_class': 2},
        {'views_per_instance': 3},
    ],
)
def test_what_the_stream_says_is_not_said_twice(shards, given):
    with pytest.raises(ConfigError, match=f'^{next(iter(given))}=.*give it there'):
        fit(network(), stream(shards), **given)


def test_a_stream_of_other_ranks_and_one_of_nothing_are_refused(shards, tmp_path):
    with pytest.raises(ConfigError, match='rank 0 of 2, and this process is 0 of 1'):
        fit(network(), stream(shards, num_ranks=2))
    save_documents(DocumentArray([Document(text='a')]), tmp_path / 'a.docs')
    single = stream(str(tmp_path / 'a.docs'), preprocess_fn=None, num_items_per_class=None)
    with pytest.raises(DataError, match='train_data: '):
        fit(network(), single)
