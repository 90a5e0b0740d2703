"""`fit(model=<nn.Module>)`: one's own model is trained in place and handed back."""

import copy

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

import finetuner
from finetuner.callback import (
    BestModelCheckpoint,
    EarlyStopping,
    EvaluationCallback,
    TrainingCheckpoint,
)
from finetuner.excepts import ConfigError, DataError, TrainingError
from finetuner.training.trainer import BaseCallback
from tests.conftest import make_vector_docs
from tests.unit.test_trainer import noisy_docs, share_of_right_neighbours


def fit(model, docs, **options):
    options = {'epochs': 1, 'batch_size': 16, 'num_items_per_class': 4, **options}
    return finetuner.fit(model, docs, **options)


def test_models_of_epochs_are_for_runs(tiny_network, vector_docs):
    with pytest.raises(ConfigError, match='save the model in on_epoch_end of a callback'):
        fit(tiny_network, vector_docs, callbacks=[TrainingCheckpoint()])


def test_the_model_given_is_trained_and_returned(tiny_network):
    docs = noisy_docs()
    before = share_of_right_neighbours(copy.deepcopy(tiny_network), docs)
    tuned = fit(tiny_network, docs, epochs=40, loss='TripletMarginLoss', learning_rate=0.01)
    assert tuned is tiny_network
    assert not tuned.training
    assert share_of_right_neighbours(tuned, docs) > max(before, 0.99)


def test_published_defaults_run(tiny_network, vector_docs):
    before = copy.deepcopy(tiny_network.state_dict())
    finetuner.fit(tiny_network, vector_docs, epochs=1)
    assert not torch.equal(before['0.weight'], tiny_network.state_dict()['0.weight'])


def test_preprocess_and_collate_are_used(tiny_network):
    docs = DocumentArray(
        Document(
            text=' '.join(map(str, doc.tensor)),
            tags={'finetuner_label': f'class {doc.tags["finetuner_label"]}'},
        )
        for doc in make_vector_docs()
    )
    seen = []

    def preprocess(doc):
        return np.array(doc.text.split(), dtype=np.float32)

    def collate(items):
        seen.append(len(items))
        return torch.from_numpy(np.stack(items))

    fit(tiny_network, docs, preprocess_fn=preprocess, collate_fn=collate)
    assert seen.count(16) == 2
    assert all(isinstance(doc.text, str) and doc.tensor is None for doc in docs)


def test_the_same_seed_gives_the_same_model(tiny_network, vector_docs):
    def tuned(seed):
        model = fit(copy.deepcopy(tiny_network), vector_docs, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(tuned(1), tuned(1))
    assert not torch.equal(tuned(1), tuned(2))


def test_configure_optimizer(tiny_network, vector_docs):
    steps = []

    def configure(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: steps.append(step) or 1.0
        )
        return optimizer, scheduler

    fit(tiny_network, vector_docs, configure_optimizer=configure)
    assert steps == [0, 1, 2]
    steps.clear()
    fit(tiny_network, vector_docs, configure_optimizer=configure, scheduler_step='epoch', epochs=3)
    assert steps == [0, 1, 2, 3]


def test_loss_as_a_module_and_its_weights(tiny_network, vector_docs):
    from pytorch_metric_learning.losses import ArcFaceLoss

    loss = ArcFaceLoss(num_classes=4, embedding_size=5)
    before = loss.W.detach().clone()
    fit(tiny_network, vector_docs, loss=loss)
    assert not torch.equal(before, loss.W.detach())


def test_callbacks_and_smaller_validation_data(tiny_network, vector_docs, capsys):
    class Count(BaseCallback):
        epochs = 0
        val_losses = ()

        def on_epoch_end(self, trainer):
            self.epochs += 1
            self.val_losses = (*self.val_losses, trainer.state.val_loss)

    count = Count()
    fit(
        tiny_network,
        vector_docs,
        eval_data=make_vector_docs(3, 4, seed=9),
        epochs=6,
        batch_size=32,
        num_items_per_class=None,
        learning_rate=1e-12,
        callbacks=[
            EvaluationCallback(vector_docs, limit=3),
            BestModelCheckpoint('val_loss'),
            count,
            EarlyStopping('recall_at_k', patience=1, min_delta=0.5),
        ],
    )
    assert count.epochs == 2
    assert all(value >= 0 for value in count.val_losses)
    assert 'recall_at_k' in capsys.readouterr().out


def test_cutting_a_classifier(tiny_classifier):
    random = np.random.default_rng(0)
    docs = DocumentArray(
        Document(
            tensor=random.random((3, 16, 16)).astype(np.float32) + label,
            tags={'finetuner_label': label},
        )
        for label in range(4)
        for _ in range(4)
    )
    original = copy.deepcopy(tiny_classifier.state_dict())
    tuned = fit(
        tiny_classifier,
        docs,
        to_embedding_model=True,
        input_size=(3, 16, 16),
        layer_name='linear_6',
        freeze=True,
        output_dim=3,
    )
    finetuner.embed(docs, tuned)
    assert docs.embeddings.shape == (16, 3)
    # the user's own stays as it was
    assert all(torch.equal(original[k], v) for k, v in tiny_classifier.state_dict().items())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'epochs': 0}, 'epochs: 0'),
        ({'epochs': 1.5}, 'epochs: 1.5'),
        ({'batch_size': 0}, 'batch_size: 0'),
        ({'learning_rate': 0}, 'learning_rate: 0'),
        ({'learning_rate': float('nan')}, 'learning_rate: nan'),
        ({'scheduler_step': 'step'}, "scheduler_step: 'step' is not batch or epoch"),
        ({'device': 'tpu'}, "device: 'tpu' is not cpu or cuda"),
        ({'loss': 'TripletMarginLos'}, "did you mean 'TripletMarginLoss'"),
        ({'configure_optimizer': lambda model: 3}, 'configure_optimizer gave int'),
        ({'output_dim': 3}, 'need to_embedding_model=True'),
        ({'to_embedding_model': True}, 'input_size is needed'),
        ({'callbacks': [EarlyStopping()]}, "monitors 'val_loss'"),
        ({'epoch': 3}, "unknown parameter 'epoch': did you mean 'epochs'"),
        ({'optimizer': 'Adam'}, "unknown parameter 'optimizer'"),
    ],
)
def test_wrong_arguments(tiny_network, vector_docs, options, message):
    with pytest.raises(ConfigError, match=message):
        fit(tiny_network, vector_docs, **options)


def test_wrong_data(tiny_network, vector_docs):
    with pytest.raises(DataError, match=r'train_data: .*label is missing'):
        fit(tiny_network, DocumentArray([*vector_docs, Document(tensor=np.ones(6))]))
    with pytest.raises(DataError, match=r'train_data: all 8 Documents have the label'):
        fit(tiny_network, vector_docs[:8])
    with pytest.raises(DataError, match='eval_data'):
        fit(tiny_network, vector_docs, eval_data=vector_docs[:8])
    with pytest.raises(DataError, match='train_data: there are no Documents'):
        fit(tiny_network, DocumentArray())


def test_a_failing_preprocess_names_the_document(tiny_network, vector_docs):
    def preprocess(doc):
        if doc.id == vector_docs[17].id:
            raise RuntimeError('lens cap on')
        return doc.tensor

    with pytest.raises(DataError, match=r'Document 17 cannot be preprocessed.*lens cap on'):
        fit(tiny_network, vector_docs, preprocess_fn=preprocess)


def test_a_model_that_does_not_fit(vector_docs):
    with pytest.raises(ConfigError, match=r'does not take what preprocess_fn.*\(2, 6\)'):
        fit(torch.nn.Linear(7, 3), vector_docs)
    with pytest.raises(ConfigError, match=r'gives \(2, 6, 1\) for two Documents'):
        fit(torch.nn.Unflatten(1, (6, 1)), vector_docs)
    frozen = torch.nn.Linear(6, 3).requires_grad_(False)
    with pytest.raises(ConfigError, match='nothing is left to train'):
        fit(frozen, vector_docs)


def test_exploding_training_says_so(vector_docs):
    model = torch.nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.fill_(float('nan'))
    with pytest.raises(TrainingError, match='the loss became nan in epoch 1, batch 1 of 2'):
        fit(model, vector_docs)
