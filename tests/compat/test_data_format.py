"""Finetuner's published chapter on data: content loaded on demand, labels, augmentation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from docarray import Document as DocarrayDocument
from emoji_data import load_emoji
from jina import Document, DocumentArray

import finetuner
from finetuner import fit
from finetuner.excepts import DataError

CONCEPTS = 4


class Embedder(torch.nn.Module):
    """A small convolutional network from `[batch, 3, 96, 96]` to `[batch, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(3, 8, 7, stride=4)
        self.linear = torch.nn.Linear(8 * 9, 8)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.convolution(pictures))
        return self.linear(torch.nn.functional.adaptive_avg_pool2d(maps, 3).flatten(1))


def load_image(d: Document) -> np.ndarray:
    d.load_uri_to_image_tensor()
    return (d.tensor / 255).astype(np.float32).transpose(2, 0, 1)


def by_label(tag) -> DocumentArray:
    """Documents with a uri, a tag, and nothing else."""
    return DocumentArray(
        Document(uri=picture.uri, tags=tag(picture.tags['finetuner_label']))
        for picture in load_emoji('train')[: 4 * CONCEPTS]
    )


def separation(docs: DocumentArray) -> float:
    """Mean distance between pictures of different concepts, in mean distances of the same one."""
    distances = np.linalg.norm(docs.embeddings[:, None] - docs.embeddings[None], axis=2)
    labels = np.arange(len(docs)) // 4
    same = labels[:, None] == labels
    return float(distances[~same].mean() / distances[same & (distances > 0)].mean())


@pytest.mark.parametrize(
    'tag',
    [
        lambda label: {'finetuner_label': label},
        lambda label: {'finetuner_label': f'concept {label}'},
        lambda label: {'finetuner': {'label': label}},
    ],
    ids=['number', 'string', 'nested'],
)
def test_fit_a_module_on_pictures_loaded_on_the_fly(tag):
    dataset = by_label(tag)
    model = Embedder()
    untrained = DocumentArray(dataset, copy=True)
    finetuner.embed(untrained, model, preprocess_fn=load_image)
    tuned = fit(
        model,
        train_data=dataset,
        preprocess_fn=load_image,
        epochs=15,
        batch_size=16,
        learning_rate=1e-2,
    )
    assert tuned is model
    # neither a picture nor an embedding stays in the data set
    assert all(doc.content is None and doc.embedding is None for doc in dataset)
    finetuner.embed(dataset, tuned, preprocess_fn=load_image)
    assert dataset.embeddings.shape == (4 * CONCEPTS, 8)
    assert separation(dataset) > 1.4 * separation(untrained)


def test_the_same_labels_in_either_form_train_the_same_model():
    trained = []
    for tag in (lambda n: {'finetuner_label': n}, lambda n: {'finetuner': {'label': float(n)}}):
        model = fit(
            Embedder(), by_label(tag), preprocess_fn=load_image, epochs=1, batch_size=8, seed=3
        )
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


def test_pictures_are_opened_only_when_a_batch_needs_them(tmp_path):
    dataset = by_label(lambda label: {'finetuner_label': label})
    opened = []

    def load_and_note(d: Document) -> np.ndarray:
        opened.append(Path(d.uri))
        return load_image(d)

    fit(Embedder(), dataset, preprocess_fn=load_and_note, epochs=2, batch_size=16)
    assert set(opened) == {Path(doc.uri) for doc in dataset}
    # two to see what the model gives, then each once an epoch
    assert len(opened) == 2 + 2 * len(dataset)


def test_a_missing_file_is_an_error_that_names_its_document():
    dataset = by_label(lambda label: {'finetuner_label': label})
    dataset[5].uri = str(Path(dataset[5].uri).with_name('nobody.webp'))
    with pytest.raises(DataError, match=r'Document 5 .*nobody\.webp'):
        fit(Embedder(), dataset, preprocess_fn=load_image, epochs=1, batch_size=16)


def test_augmentation_of_arrays_in_blob():
    """As in the second example: an ndarray in `blob`, augmented anew at each access."""
    random = np.random.default_rng(0)
    dataset = DocumentArray(
        Document(blob=random.random((3, 96, 96), np.float32), tags={'finetuner_label': number % 4})
        for number in range(16)
    )
    original = [doc.blob.copy() for doc in dataset]
    seen = []

    def augment_image(doc: Document) -> np.ndarray:
        seen.append(bool(random.random() < 0.5))
        doc.blob = doc.blob[:, :, ::-1].copy() if seen[-1] else doc.blob
        return doc.blob

    fit(Embedder(), train_data=dataset, preprocess_fn=augment_image, epochs=3, batch_size=16)
    assert len(seen) == 2 + 3 * 16
    assert 0 < sum(seen) < len(seen)
    for doc, blob in zip(dataset, original, strict=True):
        np.testing.assert_array_equal(doc.blob, blob)


def test_jinas_documents_are_docarrays():
    assert Document is DocarrayDocument is finetuner.Document
