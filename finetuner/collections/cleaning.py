"""Looking through a collection page by page, marking the pairs that are bad, and removing them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from finetuner.collections.drawing import draw_sheet
from finetuner.excepts import ConfigError, NotFoundError

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetuner.collections.datapoint import DataPoint
    from finetuner.collections.reading import SavedPairs

MAX_PAGE = 256


class Cleaning:
    """A walk through a collection; a notebook shows the page that it is at.

    Attributes:
        page: number of the page, from 1.
        marked: ids of the pairs that are marked as bad, in the order in which they were.

    Args:
        pairs: that are looked through.
        size: pairs on a page, 1 to 256.
        columns: pairs side by side.
    """

    def __init__(self, pairs: SavedPairs, size: int = 40, columns: int = 8) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_PAGE:
            raise ConfigError(f'size={size!r}: a page has 1 to {MAX_PAGE} pairs')
        self.page = 1
        self.marked: list[int] = []
        self._set = pairs
        self._size = size
        self._columns = columns

    @property
    def num_pages(self) -> int:
        """How many pages there are."""
        return max(1, -(-len(self._set) // self._size))

    @property
    def points(self) -> list[DataPoint]:
        """The pairs of this page."""
        start = (self.page - 1) * self._size
        return self._set[start : start + self._size]

    @property
    def sheet(self) -> Image:
        """The pairs of this page, each over the id by which it is marked; marked ones are framed."""
        title = f'page {self.page} of {self.num_pages}, {len(self.marked)} marked'
        return draw_sheet(self.points, title, self._columns, marked=self.marked)

    def turn(self, page: int | None = None) -> Cleaning:
        """Go to a page; to the next one where none is given, and stay at the last.

        Raises:
            ConfigError: there is no such page.
        """
        if page is None:
            page = min(self.page + 1, self.num_pages)
        if isinstance(page, bool) or not isinstance(page, int) or not 1 <= page <= self.num_pages:
            raise ConfigError(f'page={page!r}: there are pages 1 to {self.num_pages}')
        self.page = page
        return self

    def mark(self, *ids: int) -> Cleaning:
        """Mark pairs of this page as bad, by the numbers beneath them.

        Raises:
            NotFoundError: one is not on this page; none is marked then.
        """
        here = {point.id for point in self.points}
        for number in ids:
            if number not in here:
                raise NotFoundError(f'pair {number} is not on page {self.page}')
        self.marked += [number for number in dict.fromkeys(ids) if number not in self.marked]
        return self

    def unmark(self, *ids: int) -> Cleaning:
        """Take marks away."""
        self.marked = [number for number in self.marked if number not in ids]
        return self

    def remove(self) -> int:
        """Remove the marked pairs from the collection; returns how many there were."""
        removed = self._set.remove_pairs(self.marked)
        self.marked = []
        self.page = min(self.page, self.num_pages)
        return removed

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.sheet.save(file, 'PNG')
        return file.getvalue()
