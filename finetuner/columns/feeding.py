"""What a dataset, and some rows of it, give to training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from docarray import Document, DocumentArray

    from finetuner.collections import TrainingSet
    from finetuner.columns.rows import Rows


class Feeding:
    """Rows as Documents, and as collections of image/label pairs."""

    def iter_documents(
        self,
        content: str | None = None,
        label: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> Iterator[Document]:
        """The rows as labelled Documents, made one by one; see `to_documents`."""
        from finetuner.columns.documents import documents_of

        return documents_of(self._fed(), content, label, tags)

    def to_documents(
        self,
        content: str | None = None,
        label: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> DocumentArray:
        """The rows as labelled Documents, which `finetuner.fit` and everybody else takes.

        A file becomes the `uri` of its copy on this machine, or the `text` that it holds where its ending
        says that it is one; a str `text`, bytes `blob`, an array or a tensor `tensor`. The tag `row` is
        the id of the row, the Document's id that of the dataset and the row. What is missing is computed
        and kept; `materialize` before does it in several processes.

        Args:
            content: column of the contents; None where only one can be meant.
            label: column of the labels, of str, int or bool; None for none.
            tags: columns that become tags; None takes the fields that JSON holds, content and label aside.
                What is None is left out.

        Raises:
            ConfigError: there is no such column, or it is of a type that cannot be this.
            DataError: a value cannot be computed, is None where a content must be, or no label.
        """
        from docarray import DocumentArray

        return DocumentArray(self.iter_documents(content, label, tags))

    def row_documents(
        self, content: str | None, label: str | None, on_broken: Literal['stop', 'skip'] = 'stop'
    ) -> Iterator[Document]:
        """What `finetuner.fit(train_data=..., content=..., label=...)` trains on.

        Args:
            content: column of the contents; None where only one can be meant.
            label: column of the labels; None for none.
            on_broken: `'stop'` at a row of which no Document can be made, or `'skip'` it.
        """
        from finetuner.columns.documents import row_documents_of

        return row_documents_of(self._fed(), content, label, on_broken)

    def to_training_set(
        self,
        name: str,
        content: str | None = None,
        *,
        label: str,
        group: str | None = None,
        mltype: str = 'classification',
        tile_size: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
        partition: Sequence[float] | None = None,
        description: str = '',
    ) -> TrainingSet:
        """The rows as a collection of image/label pairs, fed and not saved.

        Args:
            name: of the collection.
            content: column of the images: File, bytes, an array or a tensor; None where only one column
                can be meant.
            label: column of the labels. For `classification` str, int, bool, a list of classes or a
                vector; for `object_detection` a dict or list of boxes; for `segmentation` a mask as an
                array or as a picture in grey or of a palette, or GeoJSON. An int is the place of a class
                in `classes` where these are given and are not called by numbers, else its name.
            group: column of the names of groups, such as `split`; None puts all into `train`.
            mltype: what the labels are.
            tile_size: height and width of all images; None takes those of the first picture.
            classes: names, in the order in which labels count them; None takes them from the labels.
            partition: percentages for `train`, `validate` and `test`; not with `group`.
            description: of the collection.

        Raises:
            ConfigError: there is no such column, it is of another type, or an argument is not what it
                may be.
            DataError: a row makes no pair of this collection; it is told.
        """
        from finetuner.columns.training_sets import training_set_of

        made_with = (group, mltype, tile_size, classes, partition, description)
        return training_set_of(self._fed(), name, content, label, *made_with)

    @abstractmethod
    def _fed(self) -> Rows:
        """The rows."""


class DatasetFeeding(Feeding):
    """The same of a whole dataset, which takes collections in, too."""

    def import_training_set(
        self,
        set_: TrainingSet,
        content: str,
        label: str,
        group: str | None = None,
        bands: Sequence[int] | None = None,
    ) -> int:
        """Add a row for each pair of a saved collection, as `extend` does.

        Args:
            set_: the collection, here or on a server.
            content: field of the images. A File or bytes become the picture that was fed, or a PNG of
                the same pixels; an array or a tensor the pixels `[bands, height, width]`.
            label: field of the labels: str the classes joined by ` + ` (`none` where there are none, None
                where it is Optional); int the number that the class is called by where all are, else its
                place; a list of the classes; a dict of boxes; an array, or a File for the mask as a PNG.
            group: field that tells the group.
            bands: for File and bytes, the three that become red, green and blue, counted from 0.

        Returns:
            How many were added.

        Raises:
            ConfigError: there is no such field, it is of another type, another field would have no value,
                or the collection is not saved.
            DataError: an image or a label is none that the field holds; the pair is told.
        """
        from finetuner.columns.training_sets import import_pairs

        return import_pairs(self._fed().dataset, set_, content, label, group, bands)
