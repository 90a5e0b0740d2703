"""The images and labels of a collection on disk, as training reads them.

A cache is a directory `<root>/<key>/` of HDF5 files that any program can open:

- `images-<first id>-<how many>-<random>.h5`: images, a chunk each, compressed with gzip. Such a part is
  written under another name, brought to the disk, renamed and never changed.
- `labels-<revision>-<number>.h5`: of one revision of the collection its pairs, where their images
  are, their labels, and all that is needed to read them without the collection.
- `begun-<revision>-<number>.h5`: the same while images are still missing. Who finds no other one
  reads the pairs whose images are there.

So a writer that is killed leaves nothing that is half there; the next one writes what is missing. One
writes at a time. Readers take no turns: each holds a shared lock on its `labels-` file, and neither this
file nor the parts it names are removed before the lock is gone, which it is when its process is.
"""

from __future__ import annotations

from finetuner.collections.cache.reading import OpenCache, count_cached, open_cache
from finetuner.collections.cache.source import PairRow, PairSource
from finetuner.collections.cache.writing import remove_unused, write_cache

__all__ = [
    'OpenCache',
    'PairRow',
    'PairSource',
    'count_cached',
    'open_cache',
    'remove_unused',
    'write_cache',
]
