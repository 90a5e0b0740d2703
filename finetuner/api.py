"""The functions of `import finetuner`, at the names Finetuner gave them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from docarray import Document, DocumentArray

from finetuner import callback
from finetuner.client import get_client
from finetuner.console import print_models
from finetuner.excepts import ConfigError, DataError
from finetuner.experiment import Experiment
from finetuner.fitting import fit
from finetuner.models.description import describe_backbones
from finetuner.models.zoo import BACKBONES
from finetuner.names import ARTIFACT_ID, is_alias
from finetuner.run import Run

if TYPE_CHECKING:
    import torch

    from finetuner.inference import InferenceEngine

create_run = create_training_run = fit


def list_callbacks() -> dict[str, type]:
    """The classes that `fit(callbacks=[...])` takes, by name."""
    return {
        name: value
        for name, value in vars(callback).items()
        if inspect.isclass(value) and value.__module__ == callback.__name__
    }


def list_models() -> list[str]:
    """The names that `fit` and `build_model` know."""
    return list(BACKBONES)


def list_model_options() -> dict[str, list[dict[str, Any]]]:
    """What `model_options` takes, for each model, in plain values.

    Returns:
        For each option `name`, `type`, `required`, `default`, `description`; where there are such,
        `options` (a choice), `range`, and `fields` (the same of options within an option).
    """
    return {model['name']: model['options'] for model in describe_backbones()}


def describe_models(task: str | None = None) -> None:
    """Print a table of the models.

    Args:
        task: only those for this task, such as `image-to-image`.

    Raises:
        ConfigError: there is no such task.
    """
    print_models(describe_backbones(task))


def get_run(run_name: str, experiment_name: str | None = None) -> Run:
    """Get a run by its name.

    Args:
        run_name: its name.
        experiment_name: its experiment; `default` when None.

    Raises:
        NotFoundError: no such run; the nearest names are given.
    """
    client = get_client()
    return Run.from_dict(client, client.get_run(experiment_name or 'default', run_name))


def list_runs(experiment_name: str | None = None, page: int = 1, size: int = 50) -> list[Run]:
    """List runs, newest first.

    Args:
        experiment_name: only its runs; those of all experiments when None.
        page: 1 is the first.
        size: runs on a page, 1 to 100.
    """
    client = get_client()
    return [Run.from_dict(client, run) for run in client.list_runs(experiment_name, page, size)]


def delete_run(run_name: str, experiment_name: str | None = None) -> None:
    """Delete an ended run with its artifact, log and metrics.

    Raises:
        ConflictError: the run is still going.
        NotFoundError: no such run.
    """
    get_client().delete_run(experiment_name or 'default', run_name)


def delete_runs(experiment_name: str | None = None) -> None:
    """Delete all runs, of one experiment or of all.

    Raises:
        ConflictError: one is still going; then none is deleted.
    """
    get_client().delete_runs(experiment_name)


def create_experiment(name: str = 'default') -> Experiment:
    """Create an experiment.

    Raises:
        ConflictError: the name is taken.
    """
    client = get_client()
    return Experiment.from_dict(client, client.create_experiment(name))


def get_experiment(name: str) -> Experiment:
    """Get an experiment by its name.

    Raises:
        NotFoundError: no such experiment; the nearest names are given.
    """
    client = get_client()
    return Experiment.from_dict(client, client.get_experiment(name))


def list_experiments(page: int = 1, size: int = 50) -> list[Experiment]:
    """List experiments, newest first; `size` of 1 to 100 a page."""
    client = get_client()
    return [Experiment.from_dict(client, e) for e in client.list_experiments(page, size)]


def delete_experiment(name: str) -> Experiment:
    """Delete an experiment and all its runs; returns what it was.

    Raises:
        ConflictError: one of its runs is still going.
    """
    client = get_client()
    return Experiment.from_dict(client, client.delete_experiment(name))


def delete_experiments() -> list[Experiment]:
    """Delete all experiments and all runs; returns what they were.

    Raises:
        ConflictError: a run is still going.
    """
    client = get_client()
    return [Experiment.from_dict(client, e) for e in client.delete_experiments()]


def build_model(
    name: str,
    model_options: dict[str, Any] | None = None,
    batch_size: int = 32,
    select_model: str | None = None,
    device: str | None = None,
    is_onnx: bool = False,
) -> InferenceEngine:
    """Build a pretrained model, as it was before any fine-tuning.

    Args:
        name: see `list_models()`.
        model_options: see `list_model_options()`.
        batch_size: inputs embedded at a time.
        select_model: of a model of texts and pictures, `clip-text` or `clip-vision`; None takes
            both, each for the contents that are its own.
        device: `cpu` or `cuda`; None takes a GPU where there is one.
        is_onnx: export it and run it in ONNX Runtime.

    Returns:
        An engine for `encode`.

    Raises:
        ConfigError: a name or option is wrong, or the weights cannot be had.
    """
    from finetuner.inference import build_engine

    return build_engine(name, model_options, batch_size, device, is_onnx, select_model=select_model)


def get_model(
    artifact: str | Path,
    token: str | None = None,
    batch_size: int = 32,
    select_model: str | None = None,
    device: str | None = None,
    logging_level: str = 'WARNING',
    is_onnx: bool = False,
) -> InferenceEngine:
    """Load a fine-tuned model.

    Args:
        artifact: `run.artifact_id`, an alias such as `emoji@latest`, or the path of an artifact
            directory or its zip.
        token: for the server of the login; artifacts of this machine need none.
        batch_size: inputs embedded at a time.
        select_model: of an artifact of texts and pictures, `clip-text` or `clip-vision`; None
            takes both, each for the contents that are its own.
        device: `cpu` or `cuda`; None takes a GPU where there is one.
        logging_level: accepted for Finetuner's scripts; see Python's `logging`.
        is_onnx: run the artifact's ONNX graph, several times faster on a CPU.

    Returns:
        An engine for `encode`.

    Raises:
        ArtifactError: there is none, or it is damaged.
        NotFoundError: no artifact of that id or alias.
        ConfigError: an argument is out of range.
    """
    from finetuner.inference import load_engine

    return load_engine(find_artifact(artifact, token), batch_size, select_model, device, is_onnx)


def find_artifact(artifact: str | Path, token: str | None = None) -> Path:
    """The path of an artifact given by its id, by an alias or by its path.

    Args:
        artifact: fetched from the server of the login when it is no path and not there yet.
        token: for that server, in place of the login's.

    Raises:
        NotFoundError: no artifact of that id or alias.
    """
    path, name = Path(artifact).expanduser(), str(artifact)
    # an alias may be longer than any path, which pathlib's look at it would not take
    if (ARTIFACT_ID.fullmatch(name) or is_alias(name)) and not os.path.exists(path):
        return get_client(token).find_artifact(name)
    return path


def encode(
    model: InferenceEngine, data: DocumentArray | Sequence[str], batch_size: int = 32
) -> DocumentArray | np.ndarray:
    """Embed Documents, pictures or texts.

    Args:
        model: from `get_model` or `build_model`.
        data: Documents with a content of the model's kind; texts, or paths and URIs of pictures.
        batch_size: embedded at a time; texts shorter than 64 tokens, as many more as fit.

    Returns:
        The DocumentArray with its embeddings filled; for a list, float32 `[n, dimension]`.

    Raises:
        DataError: a content could not be read; all others of a DocumentArray are embedded.
        ConfigError: `model` is not such an engine.
    """
    from finetuner.inference import InferenceEngine

    if not isinstance(model, InferenceEngine):
        raise ConfigError(
            f'model is {type(model).__name__}: encode takes what get_model or build_model gave; '
            'for a torch module of your own there is finetuner.embed'
        )
    if isinstance(data, str):
        raise ConfigError(f'data is the text {data!r}: put it in a list')
    modality = model.spec.inputs.modality
    if modality == 'text-image' and not isinstance(data, DocumentArray):
        raise ConfigError(
            f'{model.name} embeds texts and pictures: give Documents, or select_model to get_model'
        )
    field = 'text' if modality == 'text' else 'uri'
    documents: Any = data
    if not isinstance(data, DocumentArray):
        documents = DocumentArray(Document(**{field: content}) for content in data)
    failures = model.encode_documents(documents, batch_size)
    if failures:
        others = f' (and {len(failures) - 1} others failed)' if len(failures) > 1 else ''
        raise DataError(f'{failures[0][1]}{others}') from failures[0][1]
    if isinstance(data, DocumentArray):
        return data
    if not len(documents):
        return np.empty((0, model.dimension), np.float32)
    return np.asarray(documents.embeddings)


def embed(
    docs: DocumentArray,
    embed_model: torch.nn.Module,
    device: str = 'cpu',
    batch_size: int = 64,
    preprocess_fn: Callable[[Document], Any] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> None:
    """Fill the embeddings of Documents with a torch module of one's own.

    Args:
        docs: changed in place.
        embed_model: maps a batch to `[batch, dimension]`; its training mode is restored.
        device: `cpu` or `cuda`.
        batch_size: Documents embedded at a time.
        preprocess_fn: takes a Document, returns one input; None takes its content.
        collate_fn: makes a batch of a list of inputs; None stacks them.

    Raises:
        DataError: a Document cannot be made into an input; says which.
    """
    from finetuner.data.datasets import InstanceDataset
    from finetuner.data.loading import build_loader
    from finetuner.data.samplers import SequentialSampler
    from finetuner.training.callbacks import embed_all

    if not len(docs):
        return
    dataset = InstanceDataset(docs, preprocess_fn)
    loader = build_loader(dataset, SequentialSampler(len(docs), batch_size), collate_fn)
    docs.embeddings = embed_all(embed_model.to(device), loader, device)


def display(
    model: torch.nn.Module,
    input_size: tuple[int, ...] | None = None,
    input_dtype: str = 'float32',
) -> None:
    """Print the layers of a model, as `to_embedding_model` and `freeze` name them.

    Args:
        model: any module.
        input_size: shape of one input, without the batch; a torch module cannot do without.
        input_dtype: its torch dtype.

    Raises:
        ConfigError: `input_size` is missing, or the model does not run on such an input.
    """
    if input_size is None:
        raise ConfigError(
            'input_size is missing: the model is run once on random input, so give the shape of '
            'one, without the batch, such as (3, 224, 224)'
        )
    from finetuner.console import print_layers
    from finetuner.models.tailor import summary

    print_layers(summary(model, input_size, input_dtype))


def save(embed_model: torch.nn.Module | InferenceEngine, model_path: str | Path) -> None:
    """Save a model without pickle.

    Args:
        embed_model: a module, whose state dict is written as safetensors; or what `get_model` and
            `build_model` gave, written as an artifact directory.
        model_path: the file or directory; a file is replaced only when it is complete.

    Raises:
        ArtifactError: the directory is not empty.
    """
    from finetuner.artifact import save_model

    save_model(embed_model, Path(model_path))


def cos_sim(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors of the same length."""
    return np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
