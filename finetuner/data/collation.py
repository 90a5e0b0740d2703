"""Collation: from the contents of a batch to tensors, stacked, padded or tokenised."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetuner.excepts import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PAD_TOKENS = ('[PAD]', '<pad>', '<|pad|>')


def stack_contents(contents: list[Any], names: Sequence[str] | None = None) -> Tensor:
    """Stack arrays or tensors of one shape into one tensor.

    Args:
        contents: ndarrays, tensors, numbers or lists of numbers, at least one.
        names: what errors call them; by default their number in the batch.

    Returns:
        `[num_items, ...]` of the dtype that came (uint8 stays uint8), float64 as float32.

    Raises:
        DataError: a content is no array, or shapes differ.
    """
    names = names or _numbered(contents)
    tensors: list[Tensor] = []
    for content, name in zip(contents, names, strict=True):
        tensor = as_tensor(content, name)
        if tensors and tensor.shape != tensors[0].shape:
            raise DataError(
                f'{name} became an array of shape {tuple(tensor.shape)} and {names[0]} one of '
                f'{tuple(tensors[0].shape)}: give a preprocess_fn that makes them the same, or a '
                'collate_fn that takes both'
            )
        tensors.append(tensor)
    stacked = torch.stack(tensors)
    return stacked.float() if stacked.dtype == torch.float64 else stacked


def pad_contents(contents: list[Any], names: Sequence[str] | None = None) -> Tensor:
    """Stack arrays or tensors of mixed sizes, each filled up with zeros at its ends.

    Args:
        contents: ndarrays, tensors, numbers or lists of numbers, at least one, all of the same
            number of dimensions.
        names: what errors call them; by default their number in the batch.

    Returns:
        `[num_items, ...]`, in each dimension as large as the largest; of the dtype that came,
        float64 as float32.

    Raises:
        DataError: a content is no array, or they are not of one number of dimensions.
    """
    names = names or _numbered(contents)
    tensors = [as_tensor(content, name) for content, name in zip(contents, names, strict=True)]
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.ndim != tensors[0].ndim:
            raise DataError(
                f'{name} became an array of {tensor.ndim} dimensions and {names[0]} one of '
                f'{tensors[0].ndim}: sizes may differ, the number of dimensions may not; give a '
                'preprocess_fn that makes it the same'
            )
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    padded = torch.zeros(
        (len(tensors), *largest), dtype=torch.float32 if dtype == torch.float64 else dtype
    )
    for row, tensor in zip(padded, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def as_tensor(content: Any, name: str) -> Tensor:
    """Make a tensor of an array, a number or a list of numbers.

    Args:
        content: what came.
        name: what the error calls it.

    Returns:
        The content itself where it is a tensor, else one that shares its memory if possible.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(content, torch.Tensor):
        if content.layout is not torch.strided:
            raise DataError(
                f'{name} became a sparse tensor: give a preprocess_fn that returns '
                'tensor.to_dense(), or a collate_fn that takes sparse ones'
            )
        return content
    try:
        array = np.asarray(content) if not isinstance(content, (str, bytes)) else None
    except ValueError:
        # lists in it differ in length
        array = None
    if array is None or array.dtype.kind not in 'biuf':
        raise DataError(
            f'{name} became {_a_kind(content)}, which is no array: give a preprocess_fn that '
            'returns one, or a collate_fn that takes what it returns'
        )
    if array.dtype.itemsize > 8 or not array.dtype.isnative:
        # torch has neither long doubles nor the other order of bytes
        array = array.astype(f'{array.dtype.kind}{min(array.dtype.itemsize, 8)}')
    # A copy where it must be: torch takes no read-only array, which protobuf makes of a tensor.
    return torch.from_numpy(np.require(array, requirements=['C', 'W']))


def pad_token_ids(
    ids: Sequence[Sequence[int]], pad_id: int = 0, max_length: int | None = None
) -> dict[str, Tensor]:
    """Make one rectangle of the token ids of some texts.

    Args:
        ids: one list of token ids a text, at least one text.
        pad_id: stands where a text has no more tokens.
        max_length: longer texts lose what is beyond it; None for no limit.

    Returns:
        `input_ids` and `attention_mask` (1 for a token, 0 for padding), both
        `[num_texts, longest]` int64.
    """
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.int64)
    if max_length is not None:
        lengths = lengths.clamp(max=max_length)
    longest = int(lengths.max()) if len(lengths) else 0
    mask = torch.arange(longest)[None, :] < lengths[:, None]
    padded = torch.full(mask.shape, pad_id, dtype=torch.int64)
    for row, tokens, length in zip(padded, ids, lengths.tolist(), strict=True):
        row[:length] = torch.tensor(tokens[:length], dtype=torch.int64)
    return {'input_ids': padded, 'attention_mask': mask.long()}


class TextCollate:
    """Collates texts: tokenises them and pads to the longest of the batch.

    It may be used in several threads and in forked or spawned loader workers. The tokenizer that
    came is left as it is; a copy of it is used.
    """

    def __init__(
        self, tokenizer: Tokenizer | str | os.PathLike[str], max_length: int | None = None
    ) -> None:
        """Take the tokenizer.

        Args:
            tokenizer: of the `tokenizers` library, or the path of its `tokenizer.json`. What it
                says of padding to a fixed length is left aside.
            max_length: tokens of a text at most, special ones included; None for the tokenizer's
                own limit, if it has one.

        Raises:
            ConfigError: the tokenizer cannot be read, or `max_length` leaves no room for a token.
        """
        self._tokenizer = _load_tokenizer(tokenizer)
        padding = self._tokenizer.padding
        self._pad_id = int(padding['pad_id']) if padding else _pad_id(self._tokenizer)
        self._tokenizer.no_padding()
        if max_length is not None:
            num_special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
            if (
                isinstance(max_length, bool)
                or not isinstance(max_length, (int, np.integer))
                or max_length <= num_special
            ):
                raise ConfigError(
                    f'max_length must be a whole number of more than the {num_special} special '
                    f'tokens of the tokenizer, not {max_length!r}'
                )
            self._tokenizer.enable_truncation(int(max_length))

    @property
    def special_ids(self) -> frozenset[int]:
        """The tokens that are no part of a text: its beginning, end, padding and the like."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def __call__(self, texts: list[str], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Tokenise and pad a batch.

        Args:
            texts: at least one.
            names: what errors call them; by default their number in the batch.

        Returns:
            As `pad_token_ids`: `input_ids` and `attention_mask`, `[num_texts, longest]` int64.

        Raises:
            DataError: one is no text, or has no tokens.
        """
        return self.pad(self.token_ids(texts, names))

    def pad(self, ids: list[list[int]]) -> dict[str, Tensor]:
        """Pad token ids as this tokenizer does; see `pad_token_ids`."""
        return pad_token_ids(ids, self._pad_id)

    def token_ids(
        self, texts: Iterable[str], names: Sequence[str] | None = None
    ) -> list[list[int]]:
        """Tokenise some texts.

        Args:
            texts: any number.
            names: what errors call them; by default their number.

        Returns:
            The token ids of each text, cut to the longest allowed.

        Raises:
            DataError: one is no text, or has no tokens.
        """
        ids = []
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(
                    f'{_name(number, names)} is {_a_kind(text)}, not a text: text models take '
                    'Documents with `text`, or a preprocess_fn that returns a str'
                )
            if not _is_whole(text):
                raise DataError(
                    f'{_name(number, names)} ({text[:40]!r}) holds half a character (a surrogate), '
                    'which is no text: mend what it was read with'
                )
            # One by one: `encode_batch` starts threads, after which a fork may hang.
            tokens = self._tokenizer.encode(text).ids
            if not tokens:
                raise DataError(
                    f'{_name(number, names)} ({text[:40]!r}) has no tokens: leave it out'
                )
            ids.append(tokens)
        return ids


def _is_whole(text: str) -> bool:
    try:
        text.encode('utf-8')
    except UnicodeEncodeError:
        return False
    return True


def text_lengths(
    texts: Iterable[str],
    tokenizer: Tokenizer | str | os.PathLike[str],
    max_length: int | None = None,
) -> NDArray[np.int64]:
    """Count the tokens of texts, as a `LengthBucketSampler` wants them.

    Args:
        texts: any number; read one after the other.
        tokenizer: as for `TextCollate`.
        max_length: as for `TextCollate`: longer texts count as this long.

    Returns:
        `[num_texts]` int64, special tokens included.

    Raises:
        ConfigError: as `TextCollate`.
        DataError: one is no text, or has no tokens; named by its number.
    """
    collate = TextCollate(tokenizer, max_length)
    lengths = (
        len(collate.token_ids([text], [f'item {number}'])[0]) for number, text in enumerate(texts)
    )
    return np.fromiter(lengths, dtype=np.int64)


def _load_tokenizer(tokenizer: Tokenizer | str | os.PathLike[str]) -> Tokenizer:
    from tokenizers import Tokenizer

    if isinstance(tokenizer, Tokenizer):
        return Tokenizer.from_str(tokenizer.to_str())
    if not isinstance(tokenizer, (str, os.PathLike)):
        raise ConfigError(
            f'tokenizer is {_a_kind(tokenizer)}: give a Tokenizer of the `tokenizers` library, '
            'such as the `backend_tokenizer` of a transformers one, or the path of a tokenizer.json'
        )
    try:
        return Tokenizer.from_str(Path(tokenizer).read_text(encoding='utf-8'))
    except OSError as error:
        raise ConfigError(
            f"tokenizer '{tokenizer}' cannot be read: {error.strerror or error}; give the path of "
            'a tokenizer.json'
        ) from error
    except Exception as error:
        # The library raises plain Exceptions for whatever is wrong with the file.
        raise ConfigError(f"tokenizer '{tokenizer}' is no tokenizer.json: {error}") from error


def _pad_id(tokenizer: Tokenizer) -> int:
    known = (tokenizer.token_to_id(token) for token in _PAD_TOKENS)
    return next((number for number in known if number is not None), 0)


def _numbered(contents: Sequence[Any]) -> list[str]:
    return [_name(number, None) for number in range(len(contents))]


def _name(number: int, names: Sequence[str] | None) -> str:
    return names[number] if names else f'item {number}'


def _a_kind(value: Any) -> str:
    kind = type(value).__name__
    return f'{"an" if kind[0].lower() in "aeiou" else "a"} {kind}'
