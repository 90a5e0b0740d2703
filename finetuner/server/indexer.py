"""IndexExecutor: finds what is similar, over /index, /search, /rank and /delete."""

# no postponed annotations: Jina reads those of endpoints as types
import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from docarray import Document, DocumentArray
from jina import Executor, requests

from finetuner.config import Settings
from finetuner.excepts import ConfigError, ConflictError, DataError, TooLargeError
from finetuner.server import messages  # noqa: F401 - pickles are refused where it is imported
from finetuner.server.parameters import Parameters
from finetuner.server.ranking import rank_matches
from finetuner.server.refusals import log_refusals_briefly
from finetuner.server.tags import ERROR_TAG, MODEL_TAG
from finetuner.vector_index import Hit, Item, VectorIndex

# those of the Executor before this one, which get all that a request has
ENCODER_PARAMETERS = (
    'artifact',
    'batch_size',
    'on_error',
    'select_model',
    'output_dim',
    'normalize',
    'access_paths',
)
DEFAULT_LIMIT = 10
MAX_LIMIT = 1000
MAX_MATCHES = 100_000  # of one request: each becomes a Document, for all of which memory is needed
# by which the Executor that embeds a Document tells the next one with what
_OUR_TAGS = (ERROR_TAG, MODEL_TAG)
_NAME = re.compile(r'\w[\w.-]{0,63}')
_NUM_THREADS = 4
_KEPT = ('id', 'tags', 'matches')
_NO_EMBEDDING = (
    'it has no embedding: have an Executor that makes one stand before this one, or send it along'
)

T = TypeVar('T')


class IndexExecutor(Executor):
    """Keeps the embeddings that the Executor before it made, and finds the nearest.

    `/index` adds Documents or replaces those with the same ids; `/search` gives each Document the
    nearest as `matches` (parameters `limit`, `filter`, `return_contents`); `/rank` sorts the
    `matches` that each Document brought along (`limit`, `return_contents`); `/delete` takes the
    parameters `ids` or `all`, or Documents with those ids; `/index_info` tells how the index
    stands. A Document without embedding disturbs no other: its tag `finetuner_error` says why.
    """

    def __init__(
        self,
        name: str = 'default',
        directory: str | None = None,
        distance: str = 'cosine',
        keep_contents: bool = False,
        max_documents: int | None = None,
        approximate_above: int | None = None,
        logging_level: str = 'WARNING',
        **kwargs: Any,
    ) -> None:
        """Open the index; there is one writer, so a Flow holds one such Executor a directory.

        Args:
            name: of the index.
            directory: where it lies; None takes `indexes/<name>` in FINETUNER_HOME.
            distance: `cosine`, `euclidean` or `inner_product`.
            keep_contents: whether pictures and tensors are stored too; texts, uris and tags are.
            max_documents: take no more than so many.
            approximate_above: see `VectorIndex`.
            logging_level: of this library's log.
            kwargs: what Jina hands every Executor.

        Raises:
            FinetunerError: an argument is out of range, the index is open elsewhere or damaged.
        """
        super().__init__(**kwargs)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f'name is {name!r}: it takes 1 to 64 letters, digits, dots, dashes or underscores'
            )
        logging.getLogger('finetuner').setLevel(logging_level)
        place = (
            Path(directory) if directory else Settings.from_environment().home / 'indexes' / name
        )
        options = {} if approximate_above is None else {'approximate_above': approximate_above}
        self._index_name = name
        self._keep_contents = keep_contents
        self._index = VectorIndex(
            place, distance, keep_contents=keep_contents, max_documents=max_documents, **options
        )
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix='index')
        # from here on: what keeps it from starting is no request
        log_refusals_briefly(self.runtime_args)

    @requests(on='/index')
    async def index(
        self, docs: DocumentArray, parameters: dict[str, Any], **_: Any
    ) -> DocumentArray:
        """Add Documents, in place of those with the same ids; all of a request or none.

        Args:
            docs: with embeddings.
            parameters: none but those of the encoder.

        Returns:
            The same Documents in order, with their ids and tags.

        Raises:
            DataError: no Document has an embedding, or one cannot be kept.
            ConflictError: the index holds embeddings of another model.
        """
        self._parameters(parameters, ('return_contents',))
        chosen = self._embedded(docs)
        if len(chosen):
            items = [self._item(doc) for doc in chosen]
            embeddings = [doc.embedding for doc in chosen]
            model = embedding_model(chosen)
            await self._run(lambda: self._index.add(items, embeddings, model))
        for doc in docs:
            doc.pop(*(set(doc.non_empty_fields) - {'id', 'tags'}))
            doc.tags.pop(MODEL_TAG, None)
        return docs

    @requests(on='/search')
    async def search(
        self, docs: DocumentArray, parameters: dict[str, Any], **_: Any
    ) -> DocumentArray:
        """Find the Documents nearest to each.

        Args:
            docs: queries with embeddings.
            parameters: `limit`, `filter` (a tag's value, or a list of those it may have) and
                `return_contents`.

        Returns:
            The queries in order, each with `matches`, nearest first: id, text, uri, tags, and the
            distance in `scores`.

        Raises:
            ConfigError: a parameter is unknown or out of range.
            DataError: no query has an embedding, or one cannot be measured.
            ConflictError: the index holds embeddings of another model.
            TooLargeError: the request asks for more matches than `MAX_MATCHES`.
        """
        given = self._parameters(parameters, ('limit', 'filter', 'return_contents'))
        limit = _limit(given) or DEFAULT_LIMIT
        _refuse_too_many(len(docs), limit)
        where = given.values.pop('filter', None)
        if where is not None and not isinstance(where, Mapping):
            raise ConfigError(f"parameter 'filter' is {where!r}: it takes tags and their values")
        return_contents = given.pop_flag('return_contents')
        for doc in docs:
            doc.pop('matches')
        chosen = self._embedded(docs)
        if len(chosen):
            embeddings = [doc.embedding for doc in chosen]
            model = embedding_model(chosen)

            def find() -> None:
                found = self._index.search(
                    embeddings, limit, where=where, model=model, with_contents=return_contents
                )
                for doc, hits in zip(chosen, found, strict=True):
                    doc.matches = DocumentArray([self._match(hit) for hit in hits])

            await self._run(find)
        _drop_contents(docs, return_contents)
        return docs

    @requests(on='/rank')
    async def rank(
        self, docs: DocumentArray, parameters: dict[str, Any], **_: Any
    ) -> DocumentArray:
        """Sort the matches that each Document brought along; the index is not asked.

        Args:
            docs: with embeddings, the candidates of each as its matches, with embeddings too.
            parameters: `limit` and `return_contents`.

        Returns:
            The Documents in order, the nearest match first, the distance in `scores`; matches
            without embedding come last.
        """
        given = self._parameters(parameters, ('limit', 'return_contents'))
        limit = _limit(given)
        return_contents = given.pop_flag('return_contents')
        self._embedded(docs)
        distance = self._index.distance

        def sort() -> None:
            for doc in docs:
                rank_matches(doc, distance, limit)

        await self._run(sort)
        _drop_contents(docs, return_contents)
        for doc in docs:
            _drop_contents(doc.matches, return_contents, ('id', 'text', 'uri', 'tags', 'scores'))
        return docs

    @requests(on='/delete')
    async def delete(
        self, docs: DocumentArray, parameters: dict[str, Any], **_: Any
    ) -> DocumentArray:
        """Delete Documents from the index.

        Args:
            docs: those with these ids are deleted, whatever else they hold.
            parameters: `ids`, a list; or `all`, to empty the index, which then takes another model.

        Returns:
            One Document with the tags deleted and count, how many are left.

        Raises:
            ConfigError: nothing or several things are named.
        """
        given = self._parameters(parameters, ('ids', 'all'))
        ids = given.values.pop('ids', None)
        everything = given.pop_flag('all')
        if sum((ids is not None, everything, len(docs) > 0)) != 1:
            raise ConfigError(
                "what is to be deleted? Give parameters={'ids': [...]}, or Documents with those "
                "ids, or parameters={'all': True}"
            )
        if ids is not None and not (isinstance(ids, list) and all(isinstance(i, str) for i in ids)):
            raise ConfigError(f"parameter 'ids' is {ids!r}: it takes a list of texts")
        chosen = [doc.id for doc in docs] if ids is None else ids
        remove = self._index.clear if everything else lambda: self._index.delete(chosen)
        deleted = await self._run(remove)
        return DocumentArray([Document(tags={'deleted': deleted, 'count': len(self._index)})])

    @requests(on='/index_info')
    async def index_info(self, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """Tell how the index stands.

        Args:
            parameters: none are known.

        Returns:
            One Document with the tags name, count, dimension, distance, model, bytes, approximate
            and keep_contents.
        """
        self._parameters(parameters, ())
        state = await self._run(self._index.state)
        tags = {
            'name': self._index_name,
            'count': state.count,
            'dimension': state.dimension,
            'distance': state.distance,
            'model': state.model,
            'bytes': state.num_bytes,
            'approximate': state.approximate,
            'keep_contents': self._keep_contents,
        }
        return DocumentArray([Document(tags=tags)])

    def close(self) -> None:
        """Let the requests that were taken end, and the index be opened by another."""
        threads, index = getattr(self, '_threads', None), getattr(self, '_index', None)
        if threads is not None:
            threads.shutdown()
        if index is not None:
            index.close()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _parameters(self, parameters: dict[str, Any], known: tuple[str, ...]) -> Parameters:
        return Parameters(parameters, (*known, *ENCODER_PARAMETERS), self.metas.name)

    def _embedded(self, docs: DocumentArray) -> DocumentArray:
        """Those with an embedding; the others are told why not, all of them in an error."""
        chosen = DocumentArray(doc for doc in docs if doc.embedding is not None)
        for doc in docs:
            if doc.embedding is None:
                doc.tags.setdefault(ERROR_TAG, _NO_EMBEDDING)
        if len(docs) and not len(chosen):
            raise DataError(f'no Document has an embedding; the first: {docs[0].tags[ERROR_TAG]}')
        return chosen

    def _item(self, doc: Document) -> Item:
        # what lies in the uri itself is content
        is_content = doc.uri.startswith('data:')
        content = None
        if self._keep_contents:
            fields = {
                name: getattr(doc, name) for name in ('blob', 'tensor', 'chunks', 'mime_type')
            }
            fields['uri'] = doc.uri if is_content else None
            kept = Document(**{name: value for name, value in fields.items() if value is not None})
            content = kept.to_bytes(protocol='protobuf')
        tags = {name: value for name, value in doc.tags.items() if name not in _OUR_TAGS}
        return Item(doc.id, doc.text, '' if is_content else doc.uri, tags, content)

    def _match(self, hit: Hit) -> Document:
        match = Document()
        if hit.item.content is not None:
            match = Document.from_bytes(hit.item.content, protocol='protobuf')
        match.id = hit.item.id
        match.tags = dict(hit.item.tags)
        if hit.item.text:
            match.text = hit.item.text
        if hit.item.uri:
            match.uri = hit.item.uri
        match.scores[self._index.distance].value = hit.distance
        return match


def embedding_model(docs: DocumentArray) -> str | None:
    """Which model embedded these Documents, as the Executor that did it told in their tags.

    What an Executor returns as a dict is of no use here: Jina shows it to the client, and gives the
    next Executor the parameters as the client sent them.

    Args:
        docs: with the tag `finetuner_model`, or without where nobody tells.

    Returns:
        The model; None where nobody tells.

    Raises:
        ConflictError: they are of several.
    """
    told = {str(doc.tags[MODEL_TAG]) for doc in docs if MODEL_TAG in doc.tags}
    if len(told) > 1:
        raise ConflictError(
            f'the Documents of one request are embedded by several models: '
            f'{", ".join(sorted(told))}; send them one model after the other'
        )
    return told.pop() if told else None


def _limit(given: Parameters) -> int | None:
    limit = given.pop_whole_number('limit')
    if limit is not None and limit > MAX_LIMIT:
        raise ConfigError(f"parameter 'limit' is {limit}: it takes 1 to {MAX_LIMIT}")
    return limit


def _refuse_too_many(num_queries: int, limit: int) -> None:
    if num_queries * limit > MAX_MATCHES:
        raise TooLargeError(
            f'{num_queries:,} queries with limit {limit:,} ask for {num_queries * limit:,} matches, '
            f'and one request gets at most {MAX_MATCHES:,}: send fewer queries at a time, or a '
            'smaller limit'
        )


def _drop_contents(
    docs: DocumentArray, return_contents: bool, kept: tuple[str, ...] = _KEPT
) -> None:
    for doc in docs:
        doc.tags.pop(MODEL_TAG, None)
        if not return_contents:
            doc.pop(*(set(doc.non_empty_fields) - set(kept)))
            if doc.uri.startswith('data:'):
                doc.pop('uri')
        elif doc.embedding is not None:
            doc.pop('embedding')
