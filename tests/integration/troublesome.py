"""An Executor that fails in the ways an Executor can."""

from docarray import DocumentArray
from jina import Executor, requests

from finetuner.excepts import DataError


class Troublesome(Executor):
    @requests(on='/echo')
    async def echo(self, docs: DocumentArray, **_) -> DocumentArray:
        return docs

    @requests(on='/refuse')
    async def refuse(self, **_) -> None:
        raise DataError('document 3 is empty')

    @requests(on='/break')
    async def fail(self, **_) -> None:
        raise RuntimeError('cannot open /secret/place')
