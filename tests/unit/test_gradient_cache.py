"""Micro-batches: the gradients are those of the whole batch, and no more than a part is held."""

from __future__ import annotations

import copy

import pytest
import torch

from finetuner.excepts import ConfigError, TrainingError
from finetuner.training.gradient_cache import cached_backward, first_rows, split_rows
from finetuner.training.losses import build_loss, build_miner
from finetuner.training.objectives import Objective, ScoredPairObjective, SessionObjective
from finetuner.training.optimization import build_optimizer
from finetuner.training.step import StepOptions
from finetuner.training.trainer import Trainer

NUM, WIDTH, DIMENSION, PART = 24, 7, 5, 5
CLASSES = torch.arange(NUM) % 4
SESSIONS = torch.tensor([[i // 4, (0, 1, 1, -1)[i % 4]] for i in range(NUM)])


class Texts(torch.nn.Module):
    """Takes a mapping as text models do, with dropout in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(11, WIDTH)
        self.dropout = torch.nn.Dropout(0.3)
        self.inner, self.outer = torch.nn.Linear(WIDTH, 9), torch.nn.Linear(9, DIMENSION)

    def forward(self, inputs):
        mask = inputs['attention_mask'].to(self.words.weight.dtype)[..., None]
        pooled = (self.dropout(self.words(inputs['input_ids'])) * mask).sum(1) / mask.sum(1)
        return self.outer(self.dropout(torch.tanh(self.inner(pooled))))


class Towers(torch.nn.Module):
    """Two towers: each input has two embeddings, that of its text and that of its picture."""

    def __init__(self) -> None:
        super().__init__()
        self.texts, self.pictures = Texts(), torch.nn.Linear(3, DIMENSION)

    def forward(self, inputs):
        both = [self.texts(inputs['clip-text']), self.pictures(inputs['clip-vision'])]
        return torch.stack(both, dim=1).flatten(0, 1)


def texts(num=NUM):
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(num, 6, dtype=torch.int64)
    mask[::3, 4:] = 0
    return {
        'input_ids': torch.randint(0, 11, (num, 6), generator=generator),
        'attention_mask': mask,
    }


def towers(num=NUM // 2):
    pictures = torch.randn(num, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return {'clip-text': texts(num), 'clip-vision': pictures}


def built(model_class):
    torch.manual_seed(0)
    return model_class().double().train()


def objective_of(loss, options=None, miner=None, class_=Objective):
    torch.manual_seed(3)
    built_loss = build_loss(loss, options, DIMENSION, 4).double()
    if class_ is not Objective:
        return class_(built_loss)
    return class_(built_loss, build_miner(miner, None))


MEMORY = {'loss': 'NTXentLoss', 'memory_size': 64, 'miner': 'MultiSimilarityMiner'}
CASES = {
    'NTXent': (Texts, texts, CLASSES, ('NTXentLoss',)),
    'triplets, hard': (Texts, texts, CLASSES, ('TripletMarginLoss', None, 'BatchHardMiner')),
    'mined': (Texts, texts, CLASSES, ('MultiSimilarityLoss', None, 'MultiSimilarityMiner')),
    'weights of its own': (Texts, texts, CLASSES, ('ArcFaceLoss',)),
    'memory': (Texts, texts, CLASSES, ('CrossBatchMemory', MEMORY)),
    'sessions': (Texts, texts, SESSIONS, ('TripletMarginLoss', None, None, SessionObjective)),
    'scored pairs': (
        Towers,
        towers,
        torch.linspace(0, 1, NUM // 2, dtype=torch.float64).repeat_interleave(2),
        ('CosineSimilarityLoss', None, None, ScoredPairObjective),
    ),
    'two towers': (Towers, towers, torch.arange(NUM) // 2, ('NTXentLoss',)),
}  # fmt: skip


def all_gradients(*modules):
    return [p.grad for module in modules for p in module.parameters()]


@pytest.mark.parametrize('case', CASES)
def test_gradients_are_those_of_the_whole_batch(case):
    model_class, inputs_fn, labels, arguments = CASES[case]
    inputs = inputs_fn()
    plain, cached = built(model_class), built(model_class)
    objectives = objective_of(*arguments), objective_of(*arguments)
    for _ in range(2):  # what remembers a batch compares with it in the second step
        results = []
        for module, objective in zip((plain, cached), objectives, strict=True):
            module.zero_grad()
            objective.zero_grad()
            torch.manual_seed(7)
            if module is cached:
                loss = cached_backward(module, inputs, lambda e: objectives[1](e, labels), PART)
            else:
                # the same random numbers, but one graph of the whole batch
                whole = torch.cat([module(part) for part in split_rows(inputs, PART)])
                loss = objective(whole, labels)
                loss.backward()
            results.append((loss.item(), torch.rand(3)))
        assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
        # whoever draws next draws the same
        assert torch.equal(results[0][1], results[1][1])
        expected = all_gradients(plain, objectives[0])
        assert max(float(gradient.abs().max()) for gradient in expected) > 1e-3
        for gradient, other in zip(expected, all_gradients(cached, objectives[1]), strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-10, rtol=1e-10)


def test_dropout_is_not_drawn_anew():
    """The other way round: with other random numbers in the second pass gradients would differ."""
    model, inputs = built(Texts), texts()
    objective = objective_of('NTXentLoss')
    seen = []

    def embed(part):
        seen.append(model(part))
        return seen[-1]

    cached_backward(embed, inputs, lambda e: objective(e, CLASSES), PART)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(each.requires_grad for each in first)
    assert not torch.equal(first[0], model(first_rows(inputs, PART)))


def test_the_loss_may_be_scaled():
    model, inputs = built(Texts), texts()
    objective = objective_of('NTXentLoss')
    gradients = []
    for factor in (1, 1024):
        model.zero_grad()
        torch.manual_seed(7)
        loss = cached_backward(
            model, inputs, lambda e: objective(e, CLASSES), PART, lambda v, f=factor: v * f
        )
        gradients.append(model.inner.weight.grad.clone())
    assert loss < 100
    torch.testing.assert_close(gradients[0] * 1024, gradients[1])


def test_a_loss_of_nothing_has_no_gradients():
    model = built(Texts)
    loss = cached_backward(model, texts(), lambda e: torch.zeros((), requires_grad=True) * 1, PART)
    assert loss == 0
    assert all(p.grad is None for p in model.parameters())


def test_inputs_are_divided_by_rows():
    parts = list(split_rows({'a': torch.arange(7), 'b': [torch.ones(7, 2), (torch.zeros(7),)]}, 3))
    assert [part['a'].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert parts[2]['b'][0].shape == (1, 2)
    assert isinstance(parts[2]['b'][1], tuple)


@pytest.mark.parametrize(
    ('inputs', 'message'),
    [
        ({'a': torch.ones(3), 'b': torch.ones(4)}, r'\[3, 4\] rows'),
        ({}, 'no rows'),
        ({'a': 'text'}, 'holds str'),
    ],
)
def test_what_cannot_be_divided(inputs, message):
    with pytest.raises(TrainingError, match=message):
        list(split_rows(inputs, 2))


class Loader:
    """One batch."""

    def __init__(self, inputs, labels):
        self.batch = inputs, labels

    def __len__(self):
        return 1

    def __iter__(self):
        yield self.batch


class Watched(Texts):
    """Notes how many rows it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, inputs):
        self.rows.append(len(inputs['input_ids']))
        return super().forward(inputs)


def train(model, micro_batch_size, optimizer='Adam', loader=None, validation=None):
    trainer = Trainer(
        model,
        Objective(build_loss('NTXentLoss', None, DIMENSION, 4)),
        [build_optimizer(optimizer, model.parameters(), 0.01)],
        step_options=StepOptions(micro_batch_size=micro_batch_size),
    )
    return trainer.fit(loader or Loader(texts(), CLASSES), 2, validation)


def test_the_trainer_gives_the_model_no_more_than_it_takes():
    model = Watched()
    train(model, PART, validation=[(texts(), CLASSES)])
    assert max(model.rows) == PART
    assert sum(model.rows) == 2 * (2 * NUM + NUM)
    whole = Watched()
    train(whole, NUM)
    assert whole.rows == [NUM, NUM]


def test_without_dropout_the_trainer_learns_what_it_learns_from_the_whole():
    plain, parted = copy.deepcopy(model := built(Watched)), model
    plain.dropout.p = parted.dropout.p = 0.0
    losses = [train(plain, None).loss, train(parted, PART).loss]
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(parted.state_dict()[name], tensor, atol=1e-10, rtol=0)


def test_batch_normalisation_must_be_frozen(tiny_network):
    loader = Loader(torch.randn(NUM, 6), CLASSES)
    with pytest.raises(ConfigError, match=r'1 is a BatchNorm1d.*freeze_batch_norm=True'):
        train(tiny_network, PART, loader=loader)
    # a batch that is one part has its own statistics
    train(tiny_network, NUM, loader=loader)


def test_lbfgs_is_refused():
    with pytest.raises(ConfigError, match='optimizer LBFGS computes the loss several times'):
        train(built(Texts).float(), PART, optimizer='LBFGS')
