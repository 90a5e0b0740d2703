"""From a Document to what a model takes of it: pixels of its picture, or tokens of its text."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from docarray import Document

from finetuner.data.contents import is_text
from finetuner.excepts import ContentError, DataError, PictureError
from finetuner.images import picture_of
from finetuner.models.backbones import (
    TEXT_TOWER,
    VISION_TOWER,
    InputSpec,
    PictureSpec,
    TextImageSpec,
    TextSpec,
)
from finetuner.uris import DEFAULT_POLICY, PicturePolicy

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ModelInputs = np.ndarray | Mapping[str, np.ndarray]

# texts are embedded so many padded tokens at a time, for each Document that a batch of pictures has
_TOKENS_PER_DOCUMENT = 64
# So many batches cost by themselves what one costs that is full: on one core all-MiniLM-L6-v2 takes
# 2.9 ms of each in ONNX Runtime, and 0.12 ms of a token (benchmarks/capacity.py).
_BATCHES_WORTH = 24
_EXAMPLE_TEXTS = ('a', 'two words', 'a text of some more words than the others have')


class InputReader(abc.ABC):
    """How contents become the input of one model.

    Attributes:
        failure: what has happened to contents that cannot be read.
        error: the class of the error that says so.
        collate_fn: makes a batch for training of a list of inputs; None stacks them.
        batches_at_once: batches' worth of Documents that are read before `batches` divides them.
    """

    failure: str
    error: type[ContentError]
    batches_at_once = 1
    collate_fn: Callable[[list[Any]], Any] | None = None

    @abc.abstractmethod
    def read(self, doc: Document, position: int | str | None = None) -> Any:
        """Make one input of a Document.

        Args:
            doc: its content is of the model's modality.
            position: place of the Document in its array, or what errors call it.

        Raises:
            ContentError: the content is of another kind, or cannot be read.
        """

    @abc.abstractmethod
    def batch(self, items: Sequence[Any]) -> ModelInputs:
        """Make a batch of inputs, at least one, for inference."""

    @abc.abstractmethod
    def example(self) -> ModelInputs:
        """A small batch of made-up inputs, to trace a model with and to compare it on."""

    def batches(self, items: Sequence[Any], batch_size: int) -> Iterator[list[int]]:
        """Divide inputs into batches.

        Args:
            items: inputs.
            batch_size: at most so many; of texts, as many tokens as so many of middle length have.

        Yields:
            Positions among the items; each comes once.
        """
        for start in range(0, len(items), batch_size):
            yield list(range(start, min(start + batch_size, len(items))))


class PictureReader(InputReader):
    """Pictures as `[size, size, 3]` uint8, and `[batch, size, size, 3]`."""

    failure = 'pictures cannot be opened'
    error = PictureError

    def __init__(self, spec: PictureSpec, policy: PicturePolicy = DEFAULT_POLICY) -> None:
        """Take the size.

        Args:
            spec: of the model.
            policy: which pictures are opened.
        """
        self.size = spec.input_size
        self.policy = policy

    def read(self, doc: Document, position: int | str | None = None) -> np.ndarray:
        """Open a picture; see `finetuner.images.picture_of`."""
        return picture_of(doc, self.size, position, self.policy)

    def batch(self, items: Sequence[Any]) -> np.ndarray:
        """Stack pictures."""
        return np.stack(items)

    def example(self) -> np.ndarray:
        """Pictures of noise."""
        shape = (4, self.size, self.size, 3)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


class TextReader(InputReader):
    """Texts as token ids, and `input_ids` and `attention_mask`, `[batch, longest]` int64 each."""

    failure = 'texts cannot be read'
    error = ContentError
    # enough to find texts of like length among
    batches_at_once = 32

    def __init__(self, spec: TextSpec, tokenizer: Tokenizer | str | os.PathLike[str]) -> None:
        """Load the tokenizer.

        Args:
            spec: of the model.
            tokenizer: the tokenizer, or the path of its `tokenizer.json`.

        Raises:
            ConfigError: the tokenizer cannot be read.
        """
        from finetuner.data.collation import TextCollate

        self._collate = TextCollate(tokenizer, spec.max_length)
        self.collate_fn = self._collate.pad

    @property
    def special_ids(self) -> frozenset[int]:
        """The tokens that are no part of a text."""
        return self._collate.special_ids

    def read(self, doc: Document, position: int | str | None = None) -> list[int]:
        """Tokenise a Document's text."""
        name = f'Document {position}' if isinstance(position, int) else position or 'Document'
        if not doc.text:
            held = 'holds no text'
            if doc.uri or doc.tensor is not None or doc.blob:
                held = 'holds a picture or a tensor, not text'
            raise ContentError(f'{name} {held}: give it a text, or choose a model for pictures')
        try:
            return self._collate.token_ids([doc.text], [name])[0]
        except DataError as error:
            raise ContentError(str(error)) from error

    def batch(self, items: Sequence[Any]) -> dict[str, np.ndarray]:
        """Pad token ids to the longest."""
        return {name: tensor.numpy() for name, tensor in self._collate.pad(list(items)).items()}

    def example(self) -> dict[str, np.ndarray]:
        """Texts of several lengths."""
        return self.batch([self.read(Document(text=text)) for text in _EXAMPLE_TEXTS])

    def batches(self, items: Sequence[Any], batch_size: int) -> Iterator[list[int]]:
        """Put texts of like length together, as many as fit into the tokens of a batch."""
        return divide_by_length([len(item) for item in items], batch_size * _TOKENS_PER_DOCUMENT)


class TextImageReader(InputReader):
    """The contents of pairs: texts and pictures by turns, each read as its tower takes it."""

    failure = 'texts or pictures cannot be read'
    error = ContentError

    def __init__(self, text: TextReader, picture: PictureReader) -> None:
        """Join the two."""
        self.text = text
        self.picture = picture
        self.collate_fn = self._collate

    def read(self, doc: Document, position: int | str | None = None) -> Any:
        """Read a chunk by its modality or, where it names none, a Document by its content."""
        return (self.text if is_text(doc) else self.picture).read(doc, position)

    def batch(self, items: Sequence[Any]) -> ModelInputs:
        """Make a batch for one of the towers.

        Raises:
            TypeError: texts and pictures are mixed; each tower has batches of its own.
        """
        kinds = {isinstance(item, list) for item in items}
        if len(kinds) > 1:
            raise TypeError('a batch for inference is of texts or of pictures')
        return (self.text if kinds == {True} else self.picture).batch(items)

    def example(self) -> ModelInputs:
        """Not of one tower: take the readers of the towers."""
        raise TypeError('a model of two towers has no example of one kind')

    def _collate(self, items: list[Any]) -> dict[str, Any]:
        """Under each tower's name what is for it: of pairs one half, in evaluations all or nothing."""
        import torch

        texts = [item for item in items if isinstance(item, list)]
        pictures = [item for item in items if not isinstance(item, list)]
        collate: Any = self.text.collate_fn
        inputs: dict[str, Any] = {}
        if texts:
            inputs[TEXT_TOWER] = collate(texts)
        if pictures:
            inputs[VISION_TOWER] = torch.from_numpy(self.picture.batch(pictures))
        return inputs


def build_reader(
    spec: InputSpec,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    policy: PicturePolicy = DEFAULT_POLICY,
) -> InputReader:
    """Build what reads contents for a model.

    Args:
        spec: of the model.
        tokenizer: of a text model: the tokenizer, or the path of its `tokenizer.json`.
        policy: which pictures are opened.

    Raises:
        ConfigError: the tokenizer cannot be read.
    """
    if isinstance(spec, PictureSpec):
        return PictureReader(spec, policy)
    if tokenizer is None:
        raise ValueError('a text model has a tokenizer')
    if isinstance(spec, TextImageSpec):
        return TextImageReader(
            TextReader(spec.text, tokenizer), PictureReader(spec.picture, policy)
        )
    return TextReader(spec, tokenizer)


def divide_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Divide texts into batches so that embedding all of them costs least.

    A batch costs what its padded tokens cost, and something by itself: with few texts of many lengths
    full batches are mostly padding, and several that are not full take less time. The texts are
    sorted by length, and of all ways to cut them the cheapest is found by dynamic programming.

    Args:
        lengths: tokens of each text.
        max_tokens: padded tokens in a batch; a text that is longer has one of its own.

    Yields:
        Positions of a batch, those of the longest texts first; each comes once.
    """
    if not lengths:
        return
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    padded = [max(lengths[i], 1) for i in order]
    counts = np.arange(1, len(order) + 1)
    # of the texts from each place on: the least cost, and where the first batch of it ends
    least = np.zeros(len(order) + 1, np.int64)
    ends = [0] * len(order)
    for start in reversed(range(len(order))):
        most = min(len(order) - start, max(1, max_tokens // padded[start]))
        costs = least[start + 1 : start + 1 + most] + _BATCHES_WORTH * padded[start] * counts[:most]
        # the largest of those that cost the same
        best = most - 1 - int(costs[::-1].argmin())
        least[start] = costs[best] + max_tokens
        ends[start] = start + 1 + best
    start = 0
    while start < len(order):
        yield order[start : ends[start]]
        start = ends[start]
