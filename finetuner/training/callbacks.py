"""The callbacks at work: retrieval evaluation, best weights, early stopping."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from finetuner.evaluation import METRICS, evaluate_queries, mean_metrics, own_positions
from finetuner.search import search
from finetuner.significance import Stage, change_text, load_paired_test, paired_p_values
from finetuner.training.matryoshka import cut, metric_name
from finetuner.training.ranks import ALONE, Ranks
from finetuner.training.step import to_device
from finetuner.training.trainer import BaseCallback, Trainer

logger = logging.getLogger('finetuner.training')

Label = int | str
ReportMetrics = Callable[[Stage, dict[str, float]], None]
# what the search with some weights gave: `[num_queries]` by metric, and example results
Found = tuple[dict[str, torch.Tensor], dict[str, list[str]]]
ReportExamples = Callable[[Literal['before', 'after'], dict[str, list[str]]], None]


@dataclass(frozen=True)
class EvaluationSet:
    """Documents of one side of a retrieval evaluation, ready to be embedded.

    Attributes:
        loader: yields (inputs, anything) in the order of the Documents; where several processes
            train, every so-manieth batch.
        labels: one for each Document.
        ids: of the Documents, to leave a query out of its own results.
        names: what to call each Document in example results.
    """

    loader: Iterable[Any]
    labels: Sequence[Label]
    ids: Sequence[str]
    names: Sequence[str]

    def embed(self, trainer: Trainer) -> np.ndarray:
        """Embed all Documents with the current weights: float32 `[n, dimension]`."""
        return embed_all(trainer.model, self.loader, trainer.device, trainer.ranks)


@dataclass(frozen=True)
class EvaluationOptions:
    """How to search and what to keep; see `finetuner.callback.EvaluationCallback`.

    `lengths` are those that embeddings are cut to and measured at besides the whole.
    """

    limit: int = 20
    distance: str = 'cosine'
    exclude_self: bool = True
    steps_per_interval: int | None = None
    num_examples: int = 0
    lengths: tuple[int, ...] = ()


class RetrievalEvaluation(BaseCallback):
    """Embeds queries and index with the current weights and measures the search between them."""

    def __init__(
        self,
        caption: str,
        queries: EvaluationSet,
        index: EvaluationSet | None,
        options: EvaluationOptions,
        report: ReportMetrics,
        report_examples: ReportExamples,
    ) -> None:
        """Say what to evaluate and whom to tell.

        Args:
            caption: put before the metrics' names in reports.
            queries: the Documents to search with.
            index: the Documents to find; None searches among the queries.
            options: how.
            report: told the metrics before and after training, and the p-values of the change.
            report_examples: told example results before and after training.
        """
        self._caption = caption
        self._queries = queries
        self._index = index
        self._options = options
        self._report = report
        self._report_examples = report_examples
        self._by_weights: dict[tuple[int, int], Found] = {}

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, by weights."""
        return {'by_weights': self._by_weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know what was measured before."""
        self._by_weights = state['by_weights']

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Measure the model as it comes."""
        load_paired_test()  # what cannot be imported is found out now and not after training
        self._tell('before', trainer, self._current(trainer))

    def on_fit_resume(self, trainer: Trainer) -> None:
        """Report again how the model did as it came."""
        load_paired_test()
        self._tell('before', trainer, self._first)

    def on_train_batch_end(self, trainer: Trainer) -> None:
        """Measure within an epoch, when asked to."""
        interval = self._options.steps_per_interval
        if interval and trainer.state.step % interval == 0:
            metrics = mean_metrics(self._evaluate(trainer)[0])
            self._log(f'batch {trainer.state.step}', metrics)
            trainer.set_training_mode()

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Measure and add the metrics to the epoch's."""
        metrics = mean_metrics(self._current(trainer)[0])
        trainer.state.metrics.update(metrics)
        self._log(f'epoch {trainer.state.epoch + 1}', metrics)

    def on_fit_end(self, trainer: Trainer) -> None:
        """Report the metrics of the weights that are kept, and whether they changed by chance."""
        found = self._current(trainer)
        self._tell('after', trainer, found)
        before, after = self._first[0], found[0]
        p_values = paired_p_values(before, after)
        old, new = mean_metrics(before), mean_metrics(after)
        for where, suffix in self._places():
            shown = [
                f'{n} {change_text(old[n + suffix], new[n + suffix], p_values[n + suffix])}'
                for n in METRICS
            ]
            count = len(self._queries.labels)
            logger.info('Change over %d queries%s: %s', count, where, ', '.join(shown))
        self._report('p_value', self._named(p_values))

    @property
    def _first(self) -> Found:
        """What was found before training: it was measured first."""
        return next(iter(self._by_weights.values()))

    def _tell(self, stage: Literal['before', 'after'], trainer: Trainer, found: Found) -> None:
        values, examples = found
        metrics = mean_metrics(values)
        trainer.state.metrics.update(metrics)
        self._log(f'{stage} training', metrics)
        self._report(stage, self._named(metrics))
        if examples:
            self._report_examples(stage, examples)

    def _named(self, values: dict[str, float]) -> dict[str, float]:
        return {f'{self._caption}_{name}': value for name, value in values.items()}

    def _log(self, when: str, metrics: dict[str, float]) -> None:
        for where, suffix in self._places():
            shown = ', '.join(f'{name} {metrics[name + suffix]:.3f}' for name in METRICS)
            logger.info('Evaluation, %s%s: %s', when, where, shown)

    def _places(self) -> list[tuple[str, str]]:
        """What the log calls whole and cut embeddings, and what their metrics' names end with."""
        lengths = self._options.lengths
        cut_ones = [(f' at {each} dimensions', metric_name('', each)) for each in lengths]
        return [('', ''), *cut_ones]

    def _current(self, trainer: Trainer) -> Found:
        """What is found with the weights the model has now, measured at most once for each epoch."""
        weights = trainer.state.weights_epoch, trainer.state.weights_revision
        if weights not in self._by_weights:
            self._by_weights[weights] = self._evaluate(trainer)
        return self._by_weights[weights]

    def _evaluate(self, trainer: Trainer) -> Found:
        query_embeddings = self._queries.embed(trainer)
        index = self._index or self._queries
        index_embeddings = query_embeddings if self._index is None else index.embed(trainer)
        exclude = self._options.exclude_self
        values = self._measure(query_embeddings, index_embeddings)
        for length in self._options.lengths:
            at_length = self._measure(cut(query_embeddings, length), cut(index_embeddings, length))
            values |= {metric_name(name, length): value for name, value in at_length.items()}
        count = min(self._options.num_examples, len(query_embeddings))
        if not count:
            return values, {}
        _, positions = search(
            query_embeddings[:count],
            index_embeddings,
            self._options.limit,
            self._options.distance,
            own_positions(self._queries.ids[:count], index.ids) if exclude else None,
        )
        examples = {
            self._queries.names[query]: [index.names[position] for position in row]
            for query, row in enumerate(positions.tolist())
        }
        return values, examples

    def _measure(
        self, query_embeddings: np.ndarray, index_embeddings: np.ndarray
    ) -> dict[str, torch.Tensor]:
        index = self._index or self._queries
        exclude = self._options.exclude_self
        return evaluate_queries(
            query_embeddings,
            self._queries.labels,
            index_embeddings,
            index.labels,
            limit=self._options.limit,
            distance=self._options.distance,
            query_ids=self._queries.ids if exclude else None,
            index_ids=index.ids if exclude else None,
        )


def embed_all(
    model: torch.nn.Module,
    loader: Iterable[Any],
    device: torch.device | str,
    ranks: Ranks = ALONE,
) -> np.ndarray:
    """Embed everything a loader yields, in order.

    Args:
        model: maps inputs to `[batch, dimension]`; its training mode is restored.
        loader: yields (inputs, anything).
        device: where the model is.
        ranks: the processes whose loaders yield every so-manieth batch each.

    Returns:
        float32 `[n, dimension]`.
    """
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        batches = [
            model(to_device(inputs, torch.device(device))).float().cpu().numpy()
            for inputs, _ in loader
        ]
    model.train(was_training)
    return np.concatenate(ranks.interleave(batches))


class _Best:
    """Remembers the best value of a monitored quantity."""

    def __init__(
        self, monitor: str, mode: str, min_delta: float = 0, baseline: float | None = None
    ) -> None:
        falling = mode == 'min' or (mode == 'auto' and monitor.endswith('loss'))
        self._sign = -1.0 if falling else 1.0
        self._min_delta = min_delta
        self.monitor = monitor
        self.value = baseline

    def improved(self, trainer: Trainer) -> bool:
        """Whether the last epoch beat the best so far, which it then becomes."""
        current = trainer.state.metrics[self.monitor]
        if math.isnan(current):
            return False
        if self.value is not None and self._sign * (current - self.value) <= self._min_delta:
            return False
        self.value = current
        return True


class BestWeights(BaseCallback):
    """Keeps a copy of the weights of the best epoch and puts them back at the end."""

    def __init__(self, monitor: str, mode: str) -> None:
        """See `finetuner.callback.BestModelCheckpoint`."""
        self._best = _Best(monitor, mode)
        self._state: dict[str, torch.Tensor] = {}
        self._epoch = -1

    def state_dict(self) -> dict[str, Any]:
        """The best value, the epoch it came after, and its weights."""
        return {'value': self._best.value, 'epoch': self._epoch, 'weights': self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the best so far."""
        self._best.value, self._epoch = state['value'], state['epoch']
        self._state = state['weights']

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Copy the weights when they are the best so far."""
        if self._best.improved(trainer):
            self._epoch = trainer.state.epoch
            self._state = {
                name: tensor.detach().cpu().clone()
                for name, tensor in trainer.model.state_dict().items()
            }

    def on_train_end(self, trainer: Trainer) -> None:
        """Put the best weights back, unless the model still has them."""
        if self._state and self._epoch != trainer.state.weights_epoch:
            trainer.model.load_state_dict(self._state)
            trainer.state.weights_epoch = self._epoch
            logger.info(
                'Kept the weights of epoch %d: %s was %.4f',
                self._epoch + 1,
                self._best.monitor,
                self._best.value,
            )


class Stopping(BaseCallback):
    """Ends training after `patience` epochs without improvement."""

    def __init__(
        self, monitor: str, mode: str, patience: int, min_delta: float, baseline: float | None
    ) -> None:
        """See `finetuner.callback.EarlyStopping`."""
        self._best = _Best(monitor, mode, min_delta, baseline)
        self._patience = patience
        self._waited = 0

    def state_dict(self) -> dict[str, Any]:
        """The best value and the epochs since."""
        return {'value': self._best.value, 'waited': self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._best.value, self._waited = state['value'], state['waited']

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Count the epochs without improvement."""
        if self._best.improved(trainer):
            self._waited = 0
            return
        self._waited += 1
        if self._waited >= self._patience:
            trainer.state.should_stop = True
            logger.info(
                'No improvement of %s over %s in %d epochs',
                self._best.monitor,
                self._best.value,
                self._waited,
            )
