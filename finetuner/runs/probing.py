"""Measured at the start of a run: whether its batch fits in memory, and whether loading keeps up."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.data.collation import stack_contents
from finetuner.data.content_cache import KeptContents
from finetuner.excepts import DataError
from finetuner.models.backbones import TextSpec
from finetuner.runs.feeding import Feed
from finetuner.runs.findings import Findings, NoFindings
from finetuner.runs.plan import Plan

if TYPE_CHECKING:
    import torch

logger = logging.getLogger('finetuner.run')

# a step on so many tells what one takes
_NUM_TRIED = 8
# texts are looked through for the longest
_NUM_TEXTS = 500
_LENGTH_STEP = 32
# processes cost more than they save where loading takes less than this share of the step
_LOADING_SHARE = 0.05
_MICRO_BATCH = 'micro_batch_size'


@dataclass(frozen=True)
class _Trial:
    """A few items of the training data, read, and how long each took."""

    contents: list[Any]
    read_seconds: float
    vary_seconds: float


def probe_run(
    plan: Plan,
    feed: Feed,
    device: str,
    freeze_batch_norm: bool,
    findings: Findings,
    choices: Findings | None = None,
) -> tuple[Plan, Feed]:
    """Run a small training step, and choose by it what was left open.

    Where the batch does not fit in memory, `micro_batch_size` becomes what does. Where loading in
    the training process takes little time beside the step, there are no loader processes.

    Args:
        plan: of the run.
        feed: what the training loop gets.
        device: `cpu` or `cuda`.
        freeze_batch_norm: whether batch normalisation keeps its statistics in training.
        findings: what earlier runs measured.
        choices: what was chosen before the checkpoint that the run goes on from, if there is one.

    Returns:
        The plan and the feed, with these choices made.
    """
    if plan.train.kind == 'text_image_pair' or not _learns(feed.model):
        # what stands in a batch of pairs is for their model to say
        return plan, feed
    trial = _read_some(plan, feed)
    if len(trial.contents) < 2:
        # nothing can be read of the data: loading will say so
        return plan, feed
    from finetuner.training.step import to_device

    feed.model.to(device)
    inputs = to_device(_batch(plan, feed, trial.contents), next(feed.model.parameters()).device)
    found = _step(plan, feed, inputs, freeze_batch_norm, findings)
    micro_batch_size = plan.config.micro_batch_size
    if micro_batch_size is None:
        choices = choices or NoFindings()
        before = choices.recall(_MICRO_BATCH)
        if before is None:
            before = {'size': _micro_batch_size(plan, feed, freeze_batch_norm, found) or 0}
            choices.remember(_MICRO_BATCH, before)
        micro_batch_size = int(before['size']) or None
    config = plan.config.copy(update={'micro_batch_size': micro_batch_size})
    return replace(plan, config=config), _with_workers(plan, feed, trial, found['item_seconds'])


def _learns(model: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


def _read_some(plan: Plan, feed: Feed) -> _Trial:
    frozen = not isinstance(feed.pipeline.contents, KeptContents)
    dataset = plan.train.with_preprocess(feed.read)
    if frozen:
        dataset = feed.pipeline.contents.prepared(plan.train, feed.read)

    def read(count: int) -> list[Any]:
        chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), count)).astype(int)
        contents = []
        for index in chosen.tolist():
            try:
                contents.append(dataset[index][0])
            except (DataError, OSError):
                # it is named where it is loaded
                continue
        return contents

    contents = read(_NUM_TRIED)
    began = time.perf_counter()
    read(_NUM_TRIED)
    seconds = time.perf_counter() - began
    if isinstance(plan.spec.inputs, TextSpec) and not frozen:
        contents = sorted(read(_NUM_TEXTS), key=len, reverse=True)[:_NUM_TRIED]
    return _Trial(contents, seconds / _NUM_TRIED, _vary_seconds(feed, contents))


def _vary_seconds(feed: Feed, contents: list[Any]) -> float:
    import torch

    if feed.vary_fn is None or not contents:
        return 0.0
    with torch.random.fork_rng(devices=[]):
        # the first call makes what the others use
        feed.vary_fn(contents[0])
        began = time.perf_counter()
        for content in contents:
            feed.vary_fn(content)
        return (time.perf_counter() - began) / len(contents)


def _batch(plan: Plan, feed: Feed, contents: list[Any]) -> Any:
    """Inputs of the model; texts padded to one of a few lengths, for findings to hold for them."""
    import torch

    collate: Any = feed.pipeline.collate_fn or stack_contents
    inputs = collate(contents)
    spec = plan.spec.inputs
    of_texts = isinstance(inputs, Mapping) and 'input_ids' in inputs
    if not isinstance(spec, TextSpec) or not of_texts:
        return inputs
    longest = max(value.shape[1] for value in inputs.values())
    length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, max(spec.max_length, longest))
    # padding is looked at as well, as it would be if it were text
    return {
        name: torch.nn.functional.pad(value, (0, length - value.shape[1]), value=1)
        for name, value in inputs.items()
    }


def _step(
    plan: Plan, feed: Feed, inputs: Any, freeze_batch_norm: bool, findings: Findings
) -> dict[str, float]:
    """What an item of a step costs; on a GPU, how many fit of as many as were tried."""
    from finetuner.training.step_cost import measure_step, try_batch

    key = _key(plan, feed.model, inputs)
    found = findings.recall(key)
    on_gpu = next(feed.model.parameters()).is_cuda
    needed = {'item_seconds', 'fitting', 'tried'} if on_gpu else {'item_seconds', 'item_bytes'}
    known = found is not None and needed <= set(found)
    if found is not None and known and (not on_gpu or found['tried'] >= plan.batch.size):
        return found
    dtype = _dtype(plan)
    if on_gpu:
        tried = plan.batch.size
        fitting, cost = try_batch(feed.model, inputs, tried, freeze_batch_norm, dtype)
        found = {'item_seconds': cost.item_seconds, 'fitting': fitting, 'tried': tried}
    else:
        cost = measure_step(feed.model, inputs, freeze_batch_norm, dtype)
        found = {'item_seconds': cost.item_seconds, 'item_bytes': cost.item_bytes}
    findings.remember(key, found)
    return found


def _key(plan: Plan, model: torch.nn.Module, inputs: Any) -> str:
    """What the cost of a step depends on."""
    import torch

    parameter = next(model.parameters())
    device = f'{platform.processor() or platform.machine()} {torch.get_num_threads()} threads'
    if parameter.is_cuda:
        device = torch.cuda.get_device_name(parameter.device)
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    shape = max(tuple(value.shape[1:]) for value in values)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return '; '.join(
        [
            plan.backbone.name,
            'inputs ' + ' x '.join(map(str, shape)),
            f'{trained} of {sum(p.numel() for p in model.parameters())} weights trained',
            plan.config.precision,
            device,
        ]
    )


def _dtype(plan: Plan) -> torch.dtype | None:
    import torch

    return {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(plan.config.precision)


def _micro_batch_size(
    plan: Plan, feed: Feed, freeze_batch_norm: bool, found: Mapping[str, float]
) -> int | None:
    """None where a whole batch fits or must stay whole, else the largest power of two that fits."""
    from finetuner.training.step_cost import items_in_memory

    size = plan.batch.size
    if 'item_bytes' in found:
        fitting = items_in_memory(feed.model, found['item_bytes'])
    else:
        fitting = size if found['fitting'] == found['tried'] else int(found['fitting'])
    if fitting >= size:
        logger.info('Batches of %d fit in memory', size)
        return None
    whole = _why_whole(plan, feed.model, freeze_batch_norm)
    if whole is not None:
        logger.warning(
            'Batches of %d may be more than memory holds, and cannot go through the model in parts, '
            'since %s: should the run end for want of memory, take a smaller batch_size',
            size,
            whole,
        )
        return None
    part = 2 ** (fitting.bit_length() - 1)
    logger.info(
        'Batches of %d are more than memory holds: they go through the model %d at a time '
        '(micro_batch_size)',
        size,
        part,
    )
    return part


def _why_whole(plan: Plan, model: torch.nn.Module, freeze_batch_norm: bool) -> str | None:
    """Why the step would refuse to take a batch in parts; None where it does not."""
    import torch

    if plan.config.optimizer == 'LBFGS':
        return 'LBFGS computes the loss several times a step'
    norms = (torch.nn.modules.batchnorm._BatchNorm,)
    if not freeze_batch_norm and any(isinstance(module, norms) for module in model.modules()):
        return 'batch normalisation takes the statistics of a whole one (freeze_batch_norm)'
    return None


def _with_workers(plan: Plan, feed: Feed, trial: _Trial, step_seconds: float) -> Feed:
    """The feed with the processes that were asked for, or none where they are not worth it."""
    asked = feed.pipeline.num_workers
    contents = feed.pipeline.contents
    if not asked or not isinstance(contents, KeptContents):
        return feed
    contents.prepared(plan.train, feed.read)
    epochs = plan.config.epochs
    # what is kept is read in one epoch of all
    again = 1 - contents.share_kept(plan.train, feed.read) * (epochs - 1) / epochs
    seconds = trial.read_seconds * again + trial.vary_seconds
    workers = 0 if seconds < _LOADING_SHARE * step_seconds else asked
    logger.info(
        'Loading: %d processes; one alone loads %s Documents/s on average over %d epochs, the '
        'training step takes %s/s',
        workers,
        f'{1 / max(seconds, 1e-9):,.0f}',
        epochs,
        f'{1 / max(step_seconds, 1e-9):,.0f}',
    )
    return replace(feed, pipeline=replace(feed.pipeline, num_workers=workers))
