"""What README and docs say, held against the code: files, commands, names, parameters, figures."""

import ast
import asyncio
import importlib
import inspect
import re
import typing
from pathlib import Path

import numpy as np
import pytest
import yaml
from docarray import DocumentArray
from jina.clients.mixin import PostMixin
from PIL import Image
from typer.main import get_command

import finetuner
import finetuner.bulk
from finetuner import callback, cli, collections, columns, excepts
from finetuner.config import RunConfig
from finetuner.data import CSVOptions
from finetuner.data.documents import load_documents
from finetuner.excepts import ConfigError
from finetuner.fitting import fit_backbone, fit_own_model
from finetuner.models.zoo import PictureOptions
from finetuner.server import FinetunerExecutor, TrainerExecutor
from finetuner.server.errors import http_status
from tests.integration.serving import REPOSITORY

DOCUMENTS = ['README.md', *sorted(f'docs/{path.name}' for path in REPOSITORY.glob('docs/*.md'))]
FOLDERS = sorted(
    path.name for path in REPOSITORY.iterdir() if path.is_dir() and not path.name.startswith('.')
)
BLOCK = re.compile(r'^```(\w*)[^\n]*\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding='utf-8')


def blocks(name: str, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(text_of(name)) if found == language]


def prose(name: str) -> str:
    return BLOCK.sub('', text_of(name))


def table_rows(name: str, first_header: str) -> list[list[str]]:
    """Cells of the rows of the table whose first column has that header."""
    lines = text_of(name).splitlines()
    start = next(
        number
        for number, line in enumerate(lines)
        if line.startswith(f'| {first_header} |') and lines[number + 1].startswith('|--')
    )
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith('|'):
            break
        rows.append([cell.strip() for cell in line.strip('|').split('|')])
    return rows


def code_spans(text: str) -> list[str]:
    return re.findall(r'`([^`\n]+)`', text)


def test_there_is_something_to_read():
    assert (REPOSITORY / 'README.md').is_file()
    assert len(DOCUMENTS) > 3


# files, commands and names


def anchors(path: Path) -> set[str]:
    """What can stand behind `#` in a link to that file, as GitHub makes it of headings."""
    text = path.read_text(encoding='utf-8')
    headings = re.findall(r'^#+ (.*)$', BLOCK.sub('', text), re.MULTILINE)
    made = {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize('name', DOCUMENTS)
def test_links_lead_somewhere(name):
    targets = re.findall(r'\]\(([^)\s]+)\)', prose(name))
    for target in targets:
        if re.match(r'\w+:', target):
            continue
        file, _, anchor = target.partition('#')
        path = (REPOSITORY / name).parent / file if file else REPOSITORY / name
        assert path.exists(), f'{name}: {target}'
        if anchor:
            assert anchor in anchors(path), f'{name}: {target}'


@pytest.mark.parametrize('name', DOCUMENTS)
def test_paths_exist(name):
    found = re.findall(rf'(?<![\w./-])(?:\.\./)?((?:{"|".join(FOLDERS)})/[\w./*-]+)', text_of(name))
    for path in found:
        if path.startswith(('demo-output/', 'artifacts/', 'build/')):
            continue  # made by running
        path = path.rstrip('.')
        assert list(REPOSITORY.glob(path)), f'{name}: {path}'


@pytest.mark.parametrize('name', DOCUMENTS)
def test_make_targets_exist(name):
    targets = set(re.findall(r'^([a-z]+):', text_of('Makefile'), re.MULTILINE))
    for target in re.findall(r'(?:^|`|&& )make ([a-z]+)', text_of(name), re.MULTILINE):
        assert target in targets, f'{name}: make {target}'


@pytest.mark.parametrize('name', DOCUMENTS)
def test_commands_exist(name):
    commands = set(get_command(cli.app).commands)
    shell = '\n'.join([*blocks(name, 'bash'), *code_spans(prose(name))])
    for command in re.findall(r'(?:^|/)finetuner ([a-z-]+)', shell, re.MULTILINE):
        assert command in commands, f'{name}: finetuner {command}'


def resolve(dotted: str) -> object:
    """The object behind a dotted name: modules as far as they go, then attributes."""
    parts = dotted.split('.')
    found: object = importlib.import_module(parts[0])
    for count, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module('.'.join(parts[:count]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize('name', DOCUMENTS)
def test_names_in_the_library_exist(name):
    found = re.findall(r'(?<![\w./-])finetuner(?:\.[A-Za-z_]\w*)+', text_of(name))
    for dotted in found:
        if dotted != 'finetuner.db':
            resolve(dotted)


@pytest.mark.parametrize('name', DOCUMENTS)
def test_variables_of_the_environment_are_read(name):
    sources = ''.join(path.read_text() for path in REPOSITORY.glob('finetuner/**/*.py'))
    for variable in re.findall(r'FINETUNER_[A-Z_]+', text_of(name)):
        assert variable in sources, f'{name}: {variable}'


# code in the text


def signatures_of(name: str, call: ast.Call) -> list[inspect.Signature]:
    """Signatures that a call of ours in an example may have; none for others' functions."""
    named = ast.unparse(call.func).removeprefix('finetuner.')
    if named == 'fit':
        return [inspect.signature(fit_backbone), inspect.signature(fit_own_model)]
    if named in ('Document', 'DocumentArray'):
        return []
    homes = (finetuner, callback, finetuner.server, finetuner.data, finetuner.evaluation)
    # both collections and embeddings are searched
    for home in (collections, *homes) if name == 'docs/collections.md' else homes:
        if named in getattr(home, '__all__', ()) or (
            home is not finetuner and callable(getattr(home, named, None))
        ):
            return [inspect.signature(getattr(home, named))]
    if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == 'run':
        return [inspect.signature(getattr(finetuner.run.Run, call.func.attr))]
    return []


@pytest.mark.parametrize('name', DOCUMENTS)
def test_python_in_the_text_fits_the_code(name):
    importlib.import_module('finetuner.evaluation')
    for source in blocks(name, 'python'):
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split('.')[0] == 'finetuner':
                home = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(home, alias.name), f'{name}: {node.module}.{alias.name}'
            if isinstance(node, ast.Call):
                check_call(name, node)


def check_call(name: str, call: ast.Call) -> None:
    signatures = signatures_of(name, call)
    for keyword in call.keywords:
        if signatures and keyword.arg:
            known = {parameter for found in signatures for parameter in found.parameters}
            assert keyword.arg in known, f'{name}: {ast.unparse(call)}'
    if ast.unparse(call.func) == 'fit_request' and len(call.args) > 1:
        RunConfig.from_parameters({**ast.literal_eval(call.args[1]), 'train_data': 'some'})


@pytest.mark.parametrize('name', DOCUMENTS)
def test_parameters_named_in_the_text_exist(name):
    known = {
        *inspect.signature(fit_backbone).parameters,
        *inspect.signature(fit_own_model).parameters,
    }
    functions = (finetuner.build_model, finetuner.get_model, finetuner.encode, finetuner.login)
    for function in (*functions, finetuner.encode_dataset, finetuner.bulk.open_encoded):
        known |= set(inspect.signature(function).parameters)
    known |= set(inspect.signature(FinetunerExecutor.__init__).parameters)
    known |= {
        field for kind in finetuner.list_callbacks().values() for field in kind.__annotations__
    }
    known |= {*inspect.signature(PostMixin.post).parameters, 'metadata', 'headers', 'tags'}
    known |= set(inspect.signature(CSVOptions).parameters)
    for home in (collections, columns):
        for public in map(home.__dict__.get, home.__all__):
            known |= set(inspect.signature(public).parameters)
    known |= set(inspect.signature(columns.Rows.materialize).parameters)
    for method in ('import_csv', 'import_folder', 'to_training_set', 'import_training_set'):
        known |= set(inspect.signature(getattr(type(columns.Dataset), method)).parameters)
    known |= {'k', 'R', 'protocol', 'serialize_config', 'form'}
    for span in code_spans(prose(name)):
        for parameter in re.findall(r'(?:^|[(,] ?)([a-z_]+)=', span):
            assert parameter in known, f'{name}: `{span}`'
        for options in re.findall(r'model_options=(\{.*?\})', span):
            for option in re.findall(r"'(\w+)':", options):
                assert option in PictureOptions.__fields__, f'{name}: `{span}`'


def write_shoes_csv() -> None:
    """What the chapter on data speaks of, in the working directory."""
    rows = {'shoes/left.jpg': 'shoe', 'shoes/right.jpg': 'shoe', 'hats/top.jpg': 'hat'}
    for path in rows:
        Path(path).parent.mkdir(exist_ok=True)
        Image.new('RGB', (8, 8)).save(path)
    for shard in range(3):
        texts = [f'{{"text": "row {number}", "label": {number % 20}}}\n' for number in range(100)]
        Path(f'train-{shard}.jsonl').write_text(''.join(texts))
    Path('shoes.csv').write_text(''.join(f'{path},{label}\n' for path, label in rows.items()))


def test_the_blocks_of_the_chapter_on_data_run(tmp_path, monkeypatch):
    """In their order, in one namespace; `expression  # value` is worked out and compared."""
    monkeypatch.chdir(tmp_path)
    write_shoes_csv()
    namespace: dict[str, object] = {}
    compared = 0
    for source in blocks('docs/data.md', 'python'):
        exec(compile(source, 'docs/data.md', 'exec'), namespace)
        for line in source.splitlines():
            expression, _, comment = line.partition('  # ')
            try:
                expected = ast.literal_eval(comment.strip())
                compiled = compile(expression.strip(), 'docs/data.md', 'eval')
            except (SyntaxError, ValueError):
                continue
            assert eval(compiled, namespace) == expected, line
            compared += 1
    assert compared >= 3
    assert namespace['inputs'].shape == (64, 1)
    assert namespace['loader'].epoch == 2
    assert len(load_documents(tmp_path / 'train.docs')) == 4


def test_the_flow_in_the_readme_is_the_flow_file():
    (shown,) = blocks('README.md', 'yaml')
    whole = yaml.safe_load(text_of('flows/train-and-encode.yml'))

    def assert_part(part: typing.Any, of: typing.Any) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                assert_part(value, of[key])
        elif isinstance(part, list) and part and isinstance(part[0], dict):
            assert len(part) == len(of)
            for pair in zip(part, of, strict=True):
                assert_part(*pair)
        else:
            assert part == of

    assert_part(yaml.safe_load(shown), whole)


def test_the_answer_to_curl_is_the_real_one():
    text = text_of('README.md')
    request, answer = re.search(
        r'```bash\n(curl [^`]*/encode.*?)```\s+```\w*\n(.*?)```', text, re.S
    ).groups()
    picture = re.search(r'base64 -w0 (\S+?)\)', request).group(1)
    shown = re.search(r'"embedding": ?\[([-\d.e, \n]+)', answer).group(1)
    numbers = [float(number) for number in re.findall(r'-?\d[\d.e-]*', shown)]
    assert len(numbers) >= 3
    model = finetuner.build_model('efficientnet-lite0')
    embedding = finetuner.encode(model, [str(REPOSITORY / picture)])[0]
    np.testing.assert_allclose(numbers, embedding[: len(numbers)], atol=2e-3, rtol=2e-3)


# tables


def parameters_taken(executor: object, endpoint: str) -> set[str]:
    """What an endpoint says it knows when it is sent something else."""
    request = executor.requests[endpoint].fn
    with pytest.raises(ConfigError, match='unknown parameter') as caught:
        asyncio.run(request(executor, docs=DocumentArray(), parameters={'qqqqqq': 1}))
    return set(re.split(r',\s*', str(caught.value).partition('Known: ')[2].strip(' .')))


@pytest.fixture
def executors():
    found = [FinetunerExecutor(), TrainerExecutor()]
    yield found
    for executor in found:
        executor.close()


def test_endpoints_and_their_parameters(executors):
    by_endpoint = {
        endpoint: executor
        for executor in executors
        for endpoint in executor.requests
        if not endpoint.startswith(('_', '/_', '/default'))
    }
    listed = set()
    for names, parameters, _ in table_rows('docs/serving.md', 'endpoint'):
        for endpoint in code_spans(names):
            listed.add(endpoint)
            spans = {span for span in code_spans(parameters) if re.fullmatch(r'[a-z_]+', span)}
            if 'mark' in spans:
                spans -= {'mark', 'raise'}  # values of on_error
            if endpoint in ('/info', '/ready') or 'of the Executor behind it' in parameters:
                continue
            taken = parameters_taken(by_endpoint[endpoint], endpoint)
            if 'the arguments of `finetuner.fit`' in parameters:
                assert spans <= taken
                taken -= set(inspect.signature(fit_backbone).parameters) - {'train_data'}
            assert spans == taken, endpoint
    assert listed == set(by_endpoint)


def test_error_names_and_their_status():
    for status, names, _ in table_rows('docs/serving.md', 'HTTP'):
        for name in code_spans(names):
            if hasattr(excepts, name):
                assert http_status(name) == int(status), name
            else:
                assert name in ('Unauthorized', 'InternalError', 'Unavailable')


def test_metrics_in_the_table_are_those_measured():
    from finetuner.evaluation import METRICS

    rows = table_rows('docs/evaluation.md', 'name')
    assert [name for cells in rows for name in code_spans(cells[0])] == list(METRICS)
