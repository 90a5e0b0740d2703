"""Finetuner's published page on session data: its examples, statement by statement.

What is different: `preprocess_fn` takes the Document, as the chapter on the data format says, where
this page's first function takes a path; and albumentations, which is a library of the user's choice,
is replaced by the same two transforms in NumPy. Labels stand in the older nested tags, as there.
"""

import copy

import numpy as np
import pytest
import torch
from emoji_data import load_emoji
from jina import Document, DocumentArray
from PIL import Image

import finetuner
from finetuner import fit
from finetuner.data import ClassDataset, SessionDataset, SessionSampler
from finetuner.excepts import DataError


def published_root_documents() -> DocumentArray:
    root_documents = DocumentArray([Document(text='trousers'), Document(text='polo shirt')])

    root_documents[0].matches = [
        Document(text='shorts', tags={'finetuner': {'label': 1}}),
        Document(text='blouse', tags={'finetuner': {'label': -1}}),
    ]
    root_documents[1].matches = [
        Document(text='t-shirt', tags={'finetuner': {'label': 1}}),
        Document(text='earrings', tags={'finetuner': {'label': -1}}),
    ]
    return root_documents


def letters(doc: Document) -> np.ndarray:
    """How often each letter stands in the text, float32 `[26]`."""
    return np.array([doc.text.count(chr(ord('a') + i)) for i in range(26)], dtype=np.float32)


class Perceptron(torch.nn.Module):
    """From `[batch, length]` of any float type to `[batch, 8]`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(length, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs.flatten(1).float())


def distances_from_root(docs: DocumentArray, model: torch.nn.Module) -> list[list[float]]:
    """Of each session, the distance of each match from the root, in the order of the matches."""
    found = []
    for doc in docs:
        items = DocumentArray([Document(text=d.text) for d in (doc, *doc.matches)])
        finetuner.embed(items, model, preprocess_fn=letters)
        root, *matches = items.embeddings
        found.append([float(np.linalg.norm(root - match)) for match in matches])
    return found


# Here is an example of a session dataset


def test_labels_of_the_example():
    dataset = SessionDataset(published_root_documents())
    assert dataset.labels == [(0, 0), (0, 1), (0, -1), (1, 0), (1, 1), (1, -1)]
    contents = ['trousers', 'shorts', 'blouse', 'polo shirt', 't-shirt', 'earrings']
    assert [content for content, _ in dataset] == contents
    assert dataset[4] == ('t-shirt', (1, 1))


def test_both_forms_of_the_tag_are_the_same_session():
    newer = published_root_documents()
    for root in newer:
        for match in root.matches:
            match.tags = {'finetuner_label': match.tags['finetuner']['label']}
    assert SessionDataset(newer).labels == SessionDataset(published_root_documents()).labels


def test_a_batch_of_8_made_of_two_sessions():
    """As in the page's picture: two roots and their three matches each."""
    root_documents = published_root_documents()
    root_documents[0].matches.append(Document(text='jeans', tags={'finetuner': {'label': 1}}))
    root_documents[1].matches.append(Document(text='boots', tags={'finetuner': {'label': -1}}))
    dataset = SessionDataset(root_documents)
    sampler = SessionSampler(dataset.labels, batch_size=8)
    assert len(sampler) == 1
    orders = set()
    for _ in range(20):
        (batch,) = sampler
        assert sorted(batch) == list(range(8))
        orders.add(tuple(batch))
    assert orders == {(0, 1, 2, 3, 4, 5, 6, 7), (4, 5, 6, 7, 0, 1, 2, 3)}


def test_no_assumption_is_made_about_the_dissimilar_ones():
    """Only what the sessions say reaches the loss: root and match, of one session."""
    seen = []

    class Watching(torch.nn.Module):
        def forward(self, embeddings, labels, tuples):
            seen.append([indices.tolist() for indices in tuples])
            return embeddings.sum() * 0

    root_documents = published_root_documents()
    fit(Perceptron(26), root_documents, epochs=1, loss=Watching(), preprocess_fn=letters)
    ((anchors, positives, other_anchors, negatives),) = seen
    assert list(zip(anchors, positives, strict=True)) == [(0, 1), (3, 4)]
    assert list(zip(other_anchors, negatives, strict=True)) == [(0, 2), (3, 5)]


@pytest.mark.parametrize('loss', ['SiameseLoss', 'TripletLoss', 'TripletMarginLoss'])
def test_fit_the_example(loss):
    root_documents = published_root_documents()
    model = Perceptron(26)
    untrained = distances_from_root(root_documents, copy.deepcopy(model))
    tuned = finetuner.fit(
        model=model,
        train_data=root_documents,
        preprocess_fn=letters,
        loss=loss,
        epochs=60,
        learning_rate=1e-2,
    )
    assert tuned is model
    for before, (positive, negative) in zip(
        untrained, distances_from_root(root_documents, tuned), strict=True
    ):
        assert negative - positive > 0.04, 'what was clicked is nearer'
        assert negative - positive > before[1] - before[0]


def test_fit_has_a_match_without_a_label_named():
    root_documents = published_root_documents()
    root_documents[1].matches[0].tags = {}
    with pytest.raises(DataError, match=r'Document 1\b.* no label.*1 \(similar.* -1'):
        fit(Perceptron(26), root_documents, preprocess_fn=letters, epochs=1)
    with pytest.raises(KeyError, match=r'^The tag `finetuner_label` is missing from match 0 of'):
        SessionDataset(root_documents)


# Loading and preprocessing: the two examples, on pictures of objects


def test_loading_images_on_the_fly():
    dataset = DocumentArray(
        Document(uri=picture.uri, tags={'finetuner': {'label': picture.tags['finetuner_label']}})
        for picture in load_emoji('train')[:16]
    )
    opened = []

    def load_image(doc: Document) -> np.ndarray:
        opened.append(doc.uri)
        image = Image.open(doc.uri)
        return np.array(image.convert('RGB'))

    model = Perceptron(int(np.prod(load_image(dataset[0]).shape)))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    opened.clear()
    fit(model, train_data=dataset, preprocess_fn=load_image, epochs=1, batch_size=16)
    assert set(opened) == {doc.uri for doc in dataset}
    changed = zip(before, model.parameters(), strict=True)
    assert all(not torch.equal(*pair) for pair in changed)
    assert all(doc.content is None for doc in dataset), 'nothing stays in memory'


def test_sessions_of_pictures_are_loaded_on_the_fly_too():
    pictures = load_emoji('train')[:8]
    dataset = DocumentArray()
    for anchor, positive, negative in ((0, 1, 4), (4, 5, 0)):
        root = Document(uri=pictures[anchor].uri)
        root.matches = [
            Document(uri=pictures[positive].uri, tags={'finetuner': {'label': 1}}),
            Document(uri=pictures[negative].uri, tags={'finetuner': {'label': -1}}),
        ]
        dataset.append(root)
    opened = []

    def load_image(doc: Document) -> np.ndarray:
        opened.append(doc.uri)
        return np.array(Image.open(doc.uri).convert('RGB').resize((16, 16)))

    fit(Perceptron(16 * 16 * 3), train_data=dataset, preprocess_fn=load_image, epochs=2)
    # two to see what the model gives, then each item of each session once an epoch
    assert len(opened) == 2 + 2 * 6
    assert set(opened) == {pictures[i].uri for i in (0, 1, 4, 5)}


@pytest.mark.parametrize('nested', [True, False])
def test_augmenting_float_arrays_in_blob(nested):
    random = np.random.default_rng(0)
    dataset = DocumentArray(
        [
            Document(
                blob=random.random((3, 128, 128)),
                tags={'finetuner': {'label': label}} if nested else {'finetuner_label': label},
            )
            for label in (0, 0, 1, 1)
        ]
    )
    original = [doc.blob.copy() for doc in dataset]
    views = []

    def augment_image(doc: Document) -> np.ndarray:
        image = doc.blob
        if random.random() < 0.5:
            image = image[:, :, ::-1]
        if random.random() < 0.2:
            image = np.clip(image * random.uniform(0.8, 1.2) + random.uniform(-0.2, 0.2), 0, 1)
        views.append(image)
        return image

    labels = ClassDataset(dataset, augment_image).labels
    assert labels == [0, 0, 1, 1]
    assert views == [], 'nothing is augmented before it is asked for'
    fit(Perceptron(3 * 128 * 128), train_data=dataset, preprocess_fn=augment_image, epochs=6)
    assert len(views) == 2 + 6 * 4
    assert len({view.tobytes() for view in views}) > 8, 'augmented anew at each access'
    for doc, blob in zip(dataset, original, strict=True):
        np.testing.assert_array_equal(doc.blob, blob)
