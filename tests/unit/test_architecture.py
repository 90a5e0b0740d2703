"""The house stays as drawn: imports point down, `import finetuner` is light, pieces are small."""

from __future__ import annotations

import ast
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
    for folder in ('finetuner', 'executors')
    for path in sorted((ROOT / folder).rglob('*.py'))
}
PACKAGE = {name: path for name, path in MODULES.items() if name.startswith('finetuner')}
TREES = {name: ast.parse(path.read_text(encoding='utf-8')) for name, path in MODULES.items()}

# layers from the ground up: a module imports from its own layer and from those below it
LAYERS = (
    ('config', 'excepts', 'names', 'vector_index', 'callback', 'data', 'models', 'images', 'uris',
     'cores', 'ray_cluster', 'fetching', 'search', 'evaluation', 'significance', 'storage', 'training', 'runs.states',
     'console', 'augmentation', 'inputs', 'onnx_check', 'onnx_export', 'quantization',
     'precision_record', 'process_pool'),
    ('model_spec', 'artifact_files', 'artifact_check', 'artifact', 'engines', 'openvino_engine',
     'inference', 'encoding'),
    ('runs', 'collections', 'columns', 'bulk', 'logins', 'transport'),
    ('protocol', 'remote', 'local_artifacts', 'client', 'run', 'experiment'),
    ('fitting', 'dataset_encoding', 'account', 'api', 'cli', 'runs_cli', 'server_cli', 'data_cli', 'alias_cli',
     'export_cli', 'columns_cli', 'encode_cli', 'search_cli', 'server', '__init__'),
)  # fmt: skip
SQL = ('finetuner.storage', 'finetuner.runs', 'finetuner.collections', 'finetuner.columns')
# what training may know beside itself
BELOW_TRAINING = {
    'config', 'excepts', 'callback', 'data', 'search', 'evaluation', 'significance', 'console',
    'images', 'uris', 'training', 'cores',
}  # fmt: skip
HEAVY = (
    'torch', 'torchvision', 'transformers', 'onnxruntime', 'onnx', 'accelerate', 'jina', 'fastapi',
    'sqlalchemy', 'alembic', 'cv2', 'faiss', 'matplotlib', 'PIL', 'pytorch_metric_learning',
    'simplejpeg', 'fsspec', 'scipy', 'sklearn', 'pandas', 'pyarrow', 'tokenizers',
    'ranx', 'numba', 'wandb', 'tensorboard', 'httpx', 'openvino', 'rasterio', 'affine', 'h5py', 'dask', 'ray',
)  # fmt: skip


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)


def _walk(node: ast.AST):
    """All nodes, but for what only type checkers read."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not _is_type_checking(child):
            yield from _walk(child)
        else:
            for other in child.orelse:
                yield from _walk(other)


def imports_of(module: str) -> set[str]:
    """Dotted names that a module imports, also inside functions."""
    found: set[str] = set()
    for node in _walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                package = module.split('.')
                keep = len(package) - node.level + (MODULES[module].name == '__init__.py')
                base = '.'.join([*package[:keep], *filter(None, [base])])
            found |= {
                full if (full := f'{base}.{alias.name}') in MODULES else base
                for alias in node.names
            }
    return found


def layer_of(module: str) -> int:
    """The layer of `finetuner.<module>`; the longest fitting entry decides."""
    name = module.removeprefix('finetuner').removeprefix('.') or '__init__'
    fitting = [
        (len(entry), depth)
        for depth, entries in enumerate(LAYERS)
        for entry in entries
        if name == entry or name.startswith(f'{entry}.')
    ]
    if not fitting:
        pytest.fail(f'{module} has no place in the drawing: put it into LAYERS')
    return max(fitting)[1]


@pytest.mark.parametrize('module', PACKAGE)
def test_imports_point_down(module):
    upward = [
        other
        for other in imports_of(module)
        if other.split('.')[0] == 'finetuner' and layer_of(other) > layer_of(module)
    ]
    assert not upward, f'{module} imports {upward} from above it'


@pytest.mark.parametrize('module', [m for m in PACKAGE if m.startswith('finetuner.training')])
def test_training_knows_no_sql_jina_or_http(module):
    for other in imports_of(module):
        root, _, rest = other.partition('.')
        assert root not in ('sqlalchemy', 'alembic', 'jina', 'fastapi', 'httpx', 'uvicorn'), other
        if root == 'finetuner':
            assert rest.split('.')[0] in BELOW_TRAINING, other


@pytest.mark.parametrize('module', PACKAGE)
def test_only_the_server_knows_jina(module):
    if module.startswith('finetuner.server'):
        return
    users = [other for other in imports_of(module) if other.split('.')[0] in ('jina', 'fastapi')]
    assert not users, f'{module} imports {users}'


def test_sql_stays_in_the_store():
    users = {
        module
        for module in PACKAGE
        if any(o.split('.')[0] in ('sqlalchemy', 'alembic') for o in imports_of(module))
    }
    assert users
    assert all(m.startswith(SQL) for m in users), users


def test_the_walk_sees_imports_and_skips_those_for_types():
    # the rules above are worth what these two find
    assert 'finetuner.training.trainer' in imports_of('finetuner.runs.runner')
    assert 'finetuner.inference' in imports_of('finetuner.api')
    assert 'torch' not in imports_of('finetuner.api')


def modules_after(statement: str) -> set[str]:
    code = f'{statement}\nimport sys\nprint("\\n".join(sys.modules))'
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_finetuner_costs_what_docarray_costs():
    alone = modules_after('from docarray import Document, DocumentArray')
    ours = modules_after('import finetuner')
    loaded = sorted(name for name in HEAVY if name in ours and name not in alone)
    assert not loaded, f'import finetuner loads {loaded}'
    # today some 20 modules of ours, pydantic and rich
    added = {name.split('.')[0] for name in ours - alone} - {'finetuner'}
    roots = {name for name in added if name not in sys.stdlib_module_names}
    assert roots <= {'pydantic', 'rich', 'typing_extensions', 'pygments', 'typer', 'click'}, roots
    assert len(ours - alone) < 150


@pytest.mark.parametrize('module', MODULES)
def test_files_are_short(module):
    lines = len(MODULES[module].read_text(encoding='utf-8').splitlines())
    assert lines <= 400, f'{module} has {lines} lines'


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring and its signature aside."""
    body = function.body
    if ast.get_docstring(function, clean=False) is not None:
        body = body[1:]
    if not body:
        return 0
    return (function.end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize('module', MODULES)
def test_functions_are_short(module):
    long = {
        node.name: _length(node)
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _length(node) > 60
    }
    assert not long


@pytest.mark.parametrize('module', MODULES)
def test_no_assert_and_no_swallowed_errors(module):
    for node in ast.walk(TREES[module]):
        place = f'{module}:{getattr(node, "lineno", 0)}'
        assert not isinstance(node, ast.Assert), f'assert in {place}'
        if not isinstance(node, ast.ExceptHandler):
            continue
        assert node.type is not None, f'bare except in {place}'
        broad = ast.unparse(node.type) in ('Exception', 'BaseException')
        silent = all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
        assert not (broad and silent), f'{place} swallows every error'


@pytest.mark.parametrize('module', MODULES)
def test_public_things_have_docstrings(module):
    tree = TREES[module]
    if MODULES[module].read_text(encoding='utf-8').strip():
        assert ast.get_docstring(tree), f'{module} says not what it is'
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bare = []
    for node in tree.body:
        if not isinstance(node, kinds) or node.name.startswith('_'):
            continue
        overloaded = any('overload' in ast.unparse(d) for d in node.decorator_list)
        if not overloaded and not ast.get_docstring(node):
            bare.append(node.name)
    assert not bare, f'{module}: {bare}'


@pytest.mark.parametrize('module', MODULES)
def test_no_path_of_one_machine(module):
    text = MODULES[module].read_text(encoding='utf-8')
    for path in ('/work/', '/home/', '/Users/', '/root/'):
        assert path not in text, f'{path} in {module}'


def test_tests_stay_on_this_machine():
    with pytest.raises(OSError, match='stay on this machine'):
        socket.create_connection(('example.com', 80), timeout=1)
    with socket.socket() as out, pytest.raises(OSError, match='stay on this machine'):
        out.connect_ex(('192.0.2.1', 80))
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        server.listen()
        socket.create_connection(('localhost', server.getsockname()[1]), timeout=5).close()


def test_each_test_has_a_home_of_its_own(finetuner_home):
    from finetuner.config import Settings

    assert Settings.from_environment().home == finetuner_home
    assert not list(finetuner_home.iterdir())
