"""Augmentation: named recipes that change a picture or a text a little, differently at each call.

| recipe | of pictures | of texts |
|---|---|---|
| `none` | nothing | nothing |
| `light` | mirrors half of them, crops to 80 % or more, changes the light slightly | leaves out 30 % of the tokens |
| `strong` | SimCLR's: crops to 30 % or more, mirrors, changes colours, greys, blurs | leaves out half of the tokens |

Of pictures both mirror pictures left to right. That is wrong where left and right mean something: letters and
digits, road signs, arrows. Give a `preprocess_fn` there instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from finetuner.excepts import ConfigError, DataError, unknown_name

RECIPES = ('none', 'light', 'strong')

Augmentation = Callable[[np.ndarray], np.ndarray]

# shorter texts stay whole: every word of them counts
_LEAST_TOKENS = 4
_SHARES = {'light': 0.3, 'strong': 0.5}


def build_text_augmentation(name: str, special_ids: Collection[int]) -> TokenDropout | None:
    """Make the augmentation of a recipe for texts.

    Args:
        name: one of `RECIPES`.
        special_ids: tokens that stay, such as those of a text's beginning and end.

    Returns:
        A function from token ids to token ids; None for `none`.

    Raises:
        ConfigError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ConfigError(unknown_name('augmentation', name, RECIPES))
    return None if name == 'none' else TokenDropout(_SHARES[name], special_ids)


class TokenDropout:
    """Leaves out tokens at random, as words are in Wei and Zou, EDA (2019)."""

    def __init__(self, share: float, special_ids: Collection[int]) -> None:
        """Take what to leave out.

        Args:
            share: of the tokens, each by itself.
            special_ids: tokens that stay.
        """
        self._share = share
        self._special_ids = frozenset(special_ids)

    def __call__(self, token_ids: list[int]) -> list[int]:
        """Leave out tokens; one at least is left, and texts of less than four stay whole."""
        import torch

        is_special = [token in self._special_ids for token in token_ids]
        if len(token_ids) - sum(is_special) < _LEAST_TOKENS:
            return token_ids
        drawn = torch.rand(len(token_ids)).tolist()
        kept = [
            token
            for token, special, number in zip(token_ids, is_special, drawn, strict=True)
            if special or number >= self._share
        ]
        return kept if len(kept) > sum(is_special) else token_ids


def build_augmentation(name: str, size: int) -> Augmentation | None:
    """Make the augmentation of a recipe.

    It draws from torch's global generator, which loader workers seed. It can be pickled and used
    in forked workers.

    Args:
        name: one of `RECIPES`.
        size: height and width of what comes out, in pixels.

    Returns:
        A function from `[height, width, 3]` uint8 RGB to `[size, size, 3]` uint8 RGB, which
        leaves its argument alone and raises a DataError for other arrays; None for `none`.

    Raises:
        ConfigError: there is no such recipe, or size is not a positive whole number.
    """
    if name not in RECIPES:
        raise ConfigError(unknown_name('augmentation', name, RECIPES))
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise ConfigError(f'size must be a whole number of pixels of at least 1, not {size!r}')
    return None if name == 'none' else _PictureAugmentation(name, int(size))


class _PictureAugmentation:
    """A recipe for pictures of one size; its transforms are made at the first call."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._transform: Callable[[Any], Any] | None = None

    def __repr__(self) -> str:
        return f'build_augmentation({self._name!r}, {self._size})'

    def __getstate__(self) -> dict[str, Any]:
        # Unpickling a transform would import torchvision without the mending it may need.
        return {**self.__dict__, '_transform': None}

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        if (
            not isinstance(picture, np.ndarray)
            or picture.dtype != np.uint8
            or picture.ndim != 3
            or picture.shape[2] != 3
            or not picture.size
        ):
            dtype = getattr(picture, 'dtype', type(picture).__name__)
            raise DataError(
                f'augmentation {self._name!r} takes pictures [height, width, 3] of uint8, not '
                f'{list(np.shape(picture))} of {dtype}'
            )
        if self._transform is None:
            self._transform = _RECIPES[self._name](self._size)
        # A copy where it must be: torch takes no read-only array, nor one with steps backwards.
        writeable = np.require(picture, requirements=['C', 'W'])
        pixels = self._transform(_channels(writeable))
        return _rows(pixels)


def _light(size: int) -> Callable[[Any], Any]:
    v2 = _transforms()
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(0.9, 1 / 0.9)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1),
        ]
    )


def _strong(size: int) -> Callable[[Any], Any]:
    v2 = _transforms()
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.3, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply(
                [v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4), _shift_hue], p=0.8
            ),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([_blur], p=0.5),
        ]
    )


_RECIPES: dict[str, Callable[[int], Callable[[Any], Any]]] = {'light': _light, 'strong': _strong}


def _transforms() -> Any:
    from finetuner.models.torchvision_import import import_torchvision

    import_torchvision()
    from torchvision.transforms import v2

    return v2


def _shift_hue(pixels: Any) -> Any:
    """Turn all hues of a picture `[3, height, width]` by up to a tenth of the circle."""
    import cv2

    # torchvision's way takes as long as decoding the picture; OpenCV's a twentieth of that.
    hsv = cv2.cvtColor(_rows(pixels), cv2.COLOR_RGB2HSV_FULL)
    # 256 steps are the circle, and uint8 begins again after the last.
    hsv[..., 0] += np.uint8(round(_draw(-0.1, 0.1) * 256) % 256)
    return _channels(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))


def _blur(pixels: Any) -> Any:
    """Blur a picture `[3, height, width]`: at most as much as its size times 2 / 224 pixels."""
    import cv2

    # Also far faster than torchvision's. The kernel follows from sigma.
    most = max(2.0 * pixels.shape[-1] / 224, 0.2)
    return _channels(cv2.GaussianBlur(_rows(pixels), (0, 0), _draw(0.1, most)))


def _draw(low: float, high: float) -> float:
    import torch

    return torch.empty(1).uniform_(low, high).item()


def _rows(pixels: Any) -> np.ndarray:
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _channels(picture: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(picture).permute(2, 0, 1)
