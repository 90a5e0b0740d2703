"""Small arrays in docarray's SQLite storage, for tests."""

from docarray import Document, DocumentArray

NUM_DOCS = 40
PROTOBUF = {'protocol': 'protobuf'}


def documents(num_docs=NUM_DOCS):
    return [Document(id=f'id {i}', text='x' * i, tags={'label': i % 5}) for i in range(num_docs)]


def ids(docs):
    return [doc.id for doc in docs]


def written(path, docs=(), **config):
    """One file and no log beside it, as a program leaves it that has ended."""
    array(path, docs, **config)._connection.close()


def array(path, docs=(), table='train', serialize_config=PROTOBUF, **config):
    config = {'connection': str(path), 'table_name': table, **config}
    config['serialize_config'] = serialize_config
    made = DocumentArray(storage='sqlite', config=config)
    made.extend(docs)
    return made
