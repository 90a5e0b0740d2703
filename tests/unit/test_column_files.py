"""Columns of files: their folders, and the types that say endings."""

import typing

import pytest

from finetuner.columns import File, dataset
from finetuner.columns.types import column_type
from finetuner.excepts import ConfigError, DataError

TEXT = File['txt', 'md']


@pytest.fixture
def place(tmp_path):
    return {'sql_file': tmp_path / 'dataset.sql', 'data_dir': tmp_path / 'dataset'}


def folders(place):
    return {each.name for each in place['data_dir'].iterdir() if each.name[0] != '.'}


def test_a_folder_for_each_column_of_files_is_made_with_the_class(place):
    @dataset(**place)
    class Pictures:
        image: File
        mask: File | None
        name: str

        def small(image: File) -> File:
            raise NotImplementedError

        def size(image: File) -> int:
            raise NotImplementedError

    assert folders(place) == {'image', 'mask', 'small'}


def test_elsewhere_there_are_no_empty_folders(tmp_path):
    @dataset(sql_file=tmp_path / 'dataset.sql', data_dir='memory://test_column_files')
    class Pictures:
        image: File

    assert not [each for each in tmp_path.rglob('*') if each.name == 'image']


@pytest.mark.parametrize('blocked', ['dataset', 'dataset/image'])
def test_what_stands_in_the_way_of_a_folder_is_told(tmp_path, place, blocked):
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text('no folder')
    with pytest.raises(ConfigError, match=r"data_dir='.*dataset'.*'image'"):

        @dataset(**place)
        class Pictures:
            image: File


def test_files_of_an_ending_may_be_left_out(place, tmp_path):
    for annotation in (TEXT | None, None | TEXT, typing.Union[TEXT, None]):  # noqa: UP007
        assert column_type(annotation).name == "Optional[File['txt', 'md']]"

    @dataset(**place)
    class Texts:
        text: TEXT | None = None

    assert Texts.add().text is None
    for name in ('a.md', 'a.html'):
        (tmp_path / name).write_text('some')
    assert Texts.add(text=tmp_path / 'a.md').text.read() == b'some'
    with pytest.raises(DataError, match=r"'\.html'"):
        Texts.add(text=tmp_path / 'a.html')


def test_a_type_of_files_makes_files(tmp_path):
    (tmp_path / 'a.txt').write_text('some')
    assert File['txt'](tmp_path / 'a.txt') == File(tmp_path / 'a.txt')
    with pytest.raises(DataError, match=r"takes File\['md'\], and the ending is '.txt'"):
        File['md'](tmp_path / 'a.txt')


def test_endings_can_be_said_where_linters_read_annotations():
    kind = column_type(typing.Annotated[File, 'txt', '.MD'])
    assert kind.suffixes == column_type(TEXT).suffixes == ('.txt', '.md')
    assert column_type(typing.Annotated[File | None, 'a picture']).is_optional
    assert column_type(typing.Annotated[int, 'a number']) == column_type(int)
