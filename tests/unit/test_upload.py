import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
from docarray import Document, DocumentArray

from finetuner.excepts import ConfigError, ConflictError, DataError
from finetuner.server.requests import data_request, fit_request
from finetuner.server.uploads import Uploads


def documents(start: int, stop: int) -> DocumentArray:
    return DocumentArray(
        [Document(text=f'text {i}', tags={'finetuner_label': i % 7}) for i in range(start, stop)]
    )


@pytest.fixture
def uploads(tmp_path):
    with ThreadPoolExecutor(2) as threads:
        kept = Uploads(tmp_path / 'uploads', 0.3, threads)
        kept.directory_of_test = tmp_path / 'uploads'
        yield kept


def left_on_disk(uploads: Uploads) -> list:
    folder = uploads.directory_of_test
    return list(folder.iterdir()) if folder.exists() else []


def test_parts_come_together_in_order_and_once(uploads):
    async def post() -> list:
        parts = [documents(0, 100), documents(100, 200), documents(200, 237)]
        return [await uploads.collect('/fit', part, 237, 'a', {'epochs': 2}) for part in parts]

    first, second, last = asyncio.run(post())
    assert first is None
    assert second is None
    assert [doc.text for doc in last] == [f'text {i}' for i in range(237)]
    assert [doc.tags['finetuner_label'] for doc in last] == [i % 7 for i in range(237)]
    assert len(left_on_disk(uploads)) == 1  # where the Documents are read from
    last.close()
    assert left_on_disk(uploads) == []


def test_parts_that_arrive_at_once_are_complete_once(uploads):
    async def post() -> list:
        parts = [documents(i, i + 10) for i in range(0, 200, 10)]
        return await asyncio.gather(
            *(uploads.collect('/fit', part, 200, 'a', {}) for part in parts)
        )

    answers = [answer for answer in asyncio.run(post()) if answer is not None]
    assert len(answers) == 1
    assert sorted(doc.text for doc in answers[0]) == sorted(documents(0, 200).texts)


def test_all_in_one_request_need_no_upload(uploads):
    docs = documents(0, 5)
    assert asyncio.run(uploads.collect('/fit', docs, 5, None, {})) is docs


@pytest.mark.parametrize(
    ('total', 'upload', 'error', 'words'),
    [
        (None, None, ConfigError, "'total' is missing and this request holds 5 Documents"),
        (None, 'a', ConfigError, "'total' is missing"),
        (9, None, ConfigError, 'this request holds 5 of total=9 Documents'),
        (4, None, DataError, 'more than total=4'),
        (4, 'a', DataError, 'more than total=4'),
    ],
)
def test_what_does_not_add_up_is_refused_with_the_line_that_mends_it(
    uploads, total, upload, error, words
):
    with pytest.raises(error, match=words) as caught:
        asyncio.run(uploads.collect('/data', documents(0, 5), total, upload, {}))
    if error is ConfigError:
        assert "client.post('/data', inputs=docs, parameters={'total'" in str(caught.value)
        assert 'data_request' in str(caught.value)
    assert left_on_disk(uploads) == []


def test_too_many_parts_drop_the_upload(uploads):
    async def post() -> None:
        await uploads.collect('/fit', documents(0, 6), 10, 'a', {})
        await uploads.collect('/fit', documents(6, 12), 10, 'a', {})

    with pytest.raises(DataError, match='12 Documents came, more than total=10'):
        asyncio.run(post())
    assert left_on_disk(uploads) == []


@pytest.mark.parametrize(('total', 'epochs'), [(20, 3), (21, 2)])
def test_one_id_stands_for_one_upload(uploads, total, epochs):
    async def post() -> None:
        await uploads.collect('/fit', documents(0, 10), 20, 'a', {'epochs': 2})
        await uploads.collect('/fit', documents(10, 20), total, 'a', {'epochs': epochs})

    with pytest.raises(ConflictError, match='begun with other parameters'):
        asyncio.run(post())


def test_a_complete_upload_is_not_taken_twice_unless_it_failed(uploads):
    async def post() -> None:
        await uploads.collect('/fit', documents(0, 10), 10, 'a', {})
        with pytest.raises(ConflictError, match='is complete'):
            await uploads.collect('/fit', documents(0, 5), 10, 'a', {})
        uploads.forget('a')
        assert await uploads.collect('/fit', documents(0, 5), 10, 'a', {}) is None

    asyncio.run(post())


def test_an_upload_that_stops_is_dropped_and_logged(uploads, caplog):
    async def post() -> DocumentArray | None:
        await uploads.collect('/fit', documents(0, 10), 30, 'a', {})
        await asyncio.sleep(0.2)
        await uploads.collect('/fit', documents(10, 20), 30, 'a', {})  # the clock starts again
        await asyncio.sleep(0.2)
        assert left_on_disk(uploads)
        await asyncio.sleep(0.3)
        assert left_on_disk(uploads) == []
        return await uploads.collect('/fit', documents(20, 30), 30, 'a', {})

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(post()) is None
    assert "upload 'a' dropped: 20 of 30 Documents came" in caplog.text


def test_what_an_ended_server_left_is_swept(tmp_path):
    left = tmp_path / 'left'
    left.mkdir()
    (left / 'part').write_text('x')
    with ThreadPoolExecutor(1) as threads:
        Uploads(tmp_path, 60, threads)
        assert left.exists()  # another server may be at it
        Uploads(tmp_path, -1, threads)
        assert not left.exists()


def test_fit_request_reads_files_and_says_how_many(tmp_path):
    picture = tmp_path / 'a.png'
    picture.write_bytes(b'\x89PNG not really')
    docs = DocumentArray([Document(uri=str(picture), tags={'finetuner_label': 1})] * 3)
    request = fit_request(docs, {'epochs': 2, 'wait': True})
    assert request['on'] == '/fit'
    assert request['parameters']['total'] == 3
    assert request['parameters']['epochs'] == 2
    assert [doc.blob for doc in request['inputs']] == [b'\x89PNG not really'] * 3
    assert docs[0].blob == b''
    other = fit_request(docs)
    assert other['parameters']['upload'] != request['parameters']['upload']


def test_requests_stay_small():
    docs = DocumentArray([Document(blob=b'x' * 2**20) for _ in range(20)])
    request = data_request('mine', docs)
    assert request['parameters']['name'] == 'mine'
    assert 1 < request['request_size'] <= 16
    assert data_request('mine', documents(0, 5))['request_size'] == 1000


def test_fit_request_by_name_sends_nothing():
    assert fit_request('mine', {'epochs': 1}) == {
        'on': '/fit',
        'parameters': {'epochs': 1, 'train_data': 'mine'},
    }


def test_fit_request_refuses_what_it_sets_itself():
    with pytest.raises(ConfigError, match='total'):
        fit_request(documents(0, 2), {'total': 2})
    with pytest.raises(DataError, match='no Document'):
        fit_request(DocumentArray())
