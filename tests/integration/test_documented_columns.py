"""The guide of datasets as classes, run as it is written."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest

from finetuner.models.torchvision_import import import_torchvision
from tests.integration.serving import REPOSITORY
from tests.integration.test_documented import blocks

GUIDE = 'docs/columns.md'
PICTURE = REPOSITORY / 'docs' / 'images' / 'segmentation-columns.svg'
CHROMIUM = next(
    (p for p in ('/usr/bin/chromium', '/usr/bin/chromium-browser') if Path(p).exists()), None
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory that has the examples."""
    import_torchvision()
    monkeypatch.setenv('MPLBACKEND', 'agg')
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'examples').symlink_to(REPOSITORY / 'examples')
    return tmp_path


def run(path: Path) -> tuple[types.ModuleType, int]:
    """A module, statement by statement; what `expression  # value` says is compared."""
    source = path.read_text()
    lines = source.splitlines()
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    sys.modules[path.stem] = module
    compared = 0
    try:
        for statement in ast.parse(source).body:
            _, _, shown = lines[statement.end_lineno - 1].partition('  # ')
            if isinstance(statement, ast.Expr) and shown:
                code = compile(ast.Expression(statement.value), str(path), 'eval')
                value = eval(code, vars(module))
                assert repr(value) == shown, ast.unparse(statement)
                compared += 1
            else:
                exec(compile(ast.Module([statement], []), str(path), 'exec'), vars(module))
    finally:
        del sys.modules[path.stem]
    return module, compared


def check_commands(place: Path) -> None:
    """What the guide says on the command line does what it says, on what the guide has made."""
    commands = filter(None, '\n'.join(blocks(GUIDE, 'bash')).splitlines())
    shown = []
    for command in commands:
        code = f'{sys.executable} -m finetuner.cli {command.partition("#")[0].split(None, 1)[1]}'
        environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY), 'COLUMNS': '80'}
        done = subprocess.run(
            code.split(), env=environment, capture_output=True, text=True, input='y\n'
        )
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
    (said,) = blocks(GUIDE, '')
    # but for where it is, and how large SQLite's file and log are now
    table = shown[0].partition('\n\n')[2].replace(f'{place}/', '')
    assert [line.rstrip() for line in table.splitlines() if line.strip()] == [
        line.rstrip() for line in said.splitlines() if line.strip()
    ]
    assert ElementTree.parse(place / 'concepts.svg').findall('.//*[@data-column]')
    assert 'are deleted' in shown[3]


def said_in(picture: Path) -> list[tuple]:
    """Boxes, lines and labels of a picture, wherever they are."""
    names = ('data-column', 'data-from', 'data-to')
    return [
        (element.tag, element.text, *map(element.get, names))
        for element in ElementTree.parse(picture).iter()
    ]


def test_the_guide_runs_as_it_is_written(place):
    path = place / 'columns_guide.py'
    path.write_text('\n\n'.join(blocks(GUIDE, 'python')))
    module, compared = run(path)
    assert compared == 38
    # what is trained in a process of its own ends well, too
    for line in module.run.stream_logs(interval=1):
        print(line)
    assert module.run.status()['status'] == 'FINISHED'
    check_commands(place)
    # beside the module, under the name of the class
    assert (place / 'SegmentationDataset.sql').is_file()
    made = {each.name for each in (place / 'SegmentationDataset').iterdir() if each.name[0] != '.'}
    assert made == {'image', 'segmentation', 'image_512x512', 'segmentation_512x512'}
    assert (place / 'dataset.sql').is_file()
    # half of a segmentation is emoji, more or less, and its corners are not
    cv2, shares = module.cv2, []
    for picture in sorted((place / 'segmentations').iterdir()):
        pixels = cv2.imread(str(picture), cv2.IMREAD_GRAYSCALE)
        assert set(pixels.ravel()) <= {0, 255}
        shares.append(pixels.mean() / 255)
    assert len(shares) == 100
    assert 0.4 < sum(shares) / 100 < 0.7
    new = place / 'segmentation-columns.svg'
    assert said_in(new) == said_in(PICTURE), 'docs/images has an old picture: put the new one there'


def test_the_first_example_is_a_script_that_goes_on_where_it_was(place):
    script, rows, loop = blocks(GUIDE, 'python')[:3]
    path = place / 'segmentation.py'
    prepared = (
        'from finetuner.models.torchvision_import import import_torchvision\nimport_torchvision()'
    )
    rows = '\n'.join(f'    {line}' for line in rows.splitlines())
    rows = f'if not len(SegmentationDataset):\n{rows}'
    path.write_text('\n'.join([prepared, script, rows.replace('[:100]', '[:20]'), loop]))
    folder = place / 'SegmentationDataset' / 'image_512x512'
    written = []
    for _ in range(2):
        environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, str(path)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        files = [each for each in folder.rglob('*') if each.is_file()]
        written.append({each: each.stat().st_mtime_ns for each in files})
    assert len(written[0]) == 20
    assert written[0] == written[1], 'nothing is computed twice'


@pytest.mark.skipif(CHROMIUM is None, reason='Chromium is not installed: apt-get install chromium')
def test_labels_of_the_picture_are_within_their_boxes_in_a_browser():
    playwright = pytest.importorskip('playwright.sync_api')
    arguments = ['--no-sandbox'] if os.getuid() == 0 else []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.goto(PICTURE.as_uri())
        measured = page.evaluate(
            """() => [...document.querySelectorAll('[data-column]')].map(group => {
                const box = group.querySelector('rect:last-of-type').getBBox();
                return [...group.querySelectorAll('text')].map(text => {
                    const label = text.getBBox();
                    return [label.x - box.x, box.x + box.width - label.x - label.width,
                            label.y - box.y, box.y + box.height - label.y - label.height];
                });
            })"""
        )
        browser.close()
    boxes = ElementTree.parse(PICTURE).getroot().findall('.//*[@data-column]')
    assert len(measured) == len(boxes) == 8
    for labels in measured:
        assert len(labels) == 2
        assert min(min(label) for label in labels) >= 2
