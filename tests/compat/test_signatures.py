"""Signatures and defaults of the published packages, finetuner 0.8.1 and 0.4.1, and ours.

The tables say what those packages have. Ours has every published parameter in the published order
with the published default, and may add parameters behind them. Where it does not, `DEVIATIONS`
says so and why; a deviation that is no more has to leave the table.
"""

import dataclasses
import inspect

import pytest

import finetuner
from finetuner import callback, data
from finetuner.experiment import Experiment
from finetuner.fitting import fit_own_model
from finetuner.run import Run
from finetuner.server import FinetunerExecutor

NEEDED = inspect.Parameter.empty
TRAINING = [
    ('model', NEEDED),
    ('train_data', NEEDED),
    ('eval_data', None),
    ('val_split', 0.0),
    ('model_artifact', None),
    ('run_name', None),
    ('description', None),
    ('experiment_name', None),
    ('model_options', None),
    ('loss', 'TripletMarginLoss'),
    ('miner', None),
    ('miner_options', None),
    ('optimizer', 'Adam'),
    ('optimizer_options', None),
    ('learning_rate', None),
    ('epochs', 5),
    ('batch_size', None),
    ('callbacks', None),
    ('scheduler', None),
    ('scheduler_options', None),
    ('freeze', False),
    ('output_dim', None),
    ('device', 'cuda'),
    ('num_workers', 4),
    ('to_onnx', False),
    ('csv_options', None),
    ('public', False),
    ('num_items_per_class', 4),
    ('sampler', 'auto'),
    ('loss_optimizer', None),
    ('loss_optimizer_options', None),
]
NEW_MODULE_FUNCTIONS = {
    'fit': TRAINING,
    'create_run': TRAINING,
    'create_training_run': TRAINING,
    'login': [('force', False), ('interactive', None)],
    'get_token': [],
    'list_callbacks': [],
    'list_models': [],
    'list_model_options': [],
    'describe_models': [('task', None)],
    'get_run': [('run_name', NEEDED), ('experiment_name', None)],
    'list_runs': [('experiment_name', None), ('page', 1), ('size', 50)],
    'delete_run': [('run_name', NEEDED), ('experiment_name', None)],
    'delete_runs': [('experiment_name', None)],
    'create_experiment': [('name', 'default')],
    'get_experiment': [('name', NEEDED)],
    'list_experiments': [('page', 1), ('size', 50)],
    'delete_experiment': [('name', NEEDED)],
    'delete_experiments': [],
    'build_model': [
        ('name', NEEDED),
        ('model_options', None),
        ('batch_size', 32),
        ('select_model', None),
        ('device', None),
        ('is_onnx', False),
    ],
    'get_model': [
        ('artifact', NEEDED),
        ('token', None),
        ('batch_size', 32),
        ('select_model', None),
        ('device', None),
        ('logging_level', 'WARNING'),
        ('is_onnx', False),
    ],
    'encode': [('model', NEEDED), ('data', NEEDED), ('batch_size', 32)],
    'cos_sim': [('a', NEEDED), ('b', NEEDED)],
}
RUN_METHODS = {
    '__init__': [
        ('self', NEEDED),
        ('client', NEEDED),
        ('name', NEEDED),
        ('experiment_name', NEEDED),
        ('config', NEEDED),
        ('created_at', NEEDED),
        ('description', ''),
        ('task', 'training'),
        ('train_data', None),
    ],
    'status': [('self', NEEDED)],
    'logs': [('self', NEEDED)],
    'stream_logs': [('self', NEEDED), ('interval', 5)],
    'metrics': [('self', NEEDED)],
    'display_metrics': [('self', NEEDED)],
    'example_results': [('self', NEEDED)],
    'display_examples': [('self', NEEDED), ('k', 5)],
    'save_artifact': [('self', NEEDED), ('directory', 'artifacts/')],
}
RUN_PROPERTIES = ['name', 'config', 'train_data', 'artifact_id']
EXPERIMENT_METHODS = {
    '__init__': [
        ('self', NEEDED),
        ('client', NEEDED),
        ('name', NEEDED),
        ('status', NEEDED),
        ('created_at', NEEDED),
        ('description', ''),
    ],
    'get_run': [('self', NEEDED), ('name', NEEDED)],
    'list_runs': [('self', NEEDED), ('page', 50), ('size', 50)],
    'delete_run': [('self', NEEDED), ('name', NEEDED)],
    'delete_runs': [('self', NEEDED)],
    'create_training_run': [
        ('self', NEEDED),
        ('model', NEEDED),
        ('train_data', NEEDED),
        ('run_name', None),
        ('eval_data', None),
        ('csv_options', None),
        ('**kwargs', NEEDED),
    ],
}
EXPERIMENT_PROPERTIES = ['name', 'status']
CALLBACKS = {
    'BestModelCheckpoint': [('monitor', 'val_loss'), ('mode', 'auto')],
    'EarlyStopping': [
        ('monitor', 'val_loss'),
        ('mode', 'auto'),
        ('patience', 2),
        ('min_delta', 0),
        ('baseline', None),
    ],
    'EvaluationCallback': [
        ('query_data', NEEDED),
        ('index_data', None),
        ('model', None),
        ('index_model', None),
        ('multi_modal', False),
        ('batch_size', 32),
        ('exclude_self', True),
        ('limit', 20),
        ('distance', 'cosine'),
        ('steps_per_interval', None),
        ('gather_examples', False),
        ('num_example_queries', 5),
        ('num_workers', 8),
        ('caption', None),
        ('output_model_names', False),
        ('query_sample_size', None),
    ],
    'TrainingCheckpoint': [('last_k_epochs', 1)],
    'WandBLogger': [
        ('metrics_logger_step', 'epoch'),
        ('wandb_args', None),
        ('log_zero_shot', True),
    ],
    'WiSEFTCallback': [('alpha', 0.4)],
}
OLD_FIT = [
    ('model', NEEDED),
    ('train_data', NEEDED),
    ('eval_data', None),
    ('epochs', 10),
    ('batch_size', 256),
    ('loss', 'SiameseLoss'),
    ('configure_optimizer', None),
    ('learning_rate', 1e-3),
    ('scheduler_step', 'batch'),
    ('device', 'cpu'),
    ('preprocess_fn', None),
    ('collate_fn', None),
    ('num_items_per_class', None),
    ('callbacks', None),
    ('num_workers', 0),
    ('to_embedding_model', True),
    ('input_size', None),
    ('input_dtype', 'float32'),
    ('layer_name', None),
    ('freeze', False),
    ('projection_head', None),
]
OLD_MODULE_FUNCTIONS = {
    'embed': [
        ('docs', NEEDED),
        ('embed_model', NEEDED),
        ('device', 'cpu'),
        ('batch_size', 64),
        ('preprocess_fn', None),
        ('collate_fn', None),
    ],
    'display': [('model', NEEDED), ('input_size', None), ('input_dtype', 'float32')],
    'save': [
        ('embed_model', NEEDED),
        ('model_path', NEEDED),
        ('*args', NEEDED),
        ('**kwargs', NEEDED),
    ],
}
DATASET = [('docs', NEEDED), ('preprocess_fn', None)]
SAMPLERS = {
    'ClassSampler': [('labels', NEEDED), ('batch_size', NEEDED), ('num_items_per_class', None)],
    'SessionSampler': [('labels', NEEDED), ('batch_size', NEEDED), ('shuffle', True)],
    'InstanceSampler': [
        ('num_instances', NEEDED),
        ('batch_size', NEEDED),
        ('views_per_instance', 2),
    ],
}

# what differs from the tables, by function and parameter, and why
DEVIATIONS = {
    ('Experiment.list_runs', 'page'): (
        'the published default, page 50, shows an experiment of fewer than 2,451 runs as empty; '
        'the first page was meant'
    ),
    ('Experiment.create_training_run', '**kwargs'): 'named parameters',
    ('fit of a module', 'to_embedding_model'): (
        'published as True in an overload for type checkers; the function that ran took a missing '
        'one for False'
    ),
    **{
        (name, 'loss'): (
            'None takes the recipe measured for the model and the kind of data; a loss that is '
            'named is taken'
        )
        for name in ('fit', 'create_run', 'create_training_run')
    },
    ('save', '*args'): 'went on to torch.save, and no pickle is written here',
    ('save', '**kwargs'): 'went on to torch.save, and no pickle is written here',
}
# what finetuner 0.8.1 has and we have not yet
ABSENT_FUNCTIONS = {
    'synthesize': 'making training data is not there yet',
    'create_synthesis_run': 'making training data is not there yet',
}
ABSENT_CALLBACKS: dict[str, str] = {}
# what we have and finetuner 0.8.1 had not
ADDED_CALLBACKS = {'TensorBoardLogger'}


def parameters(function) -> list[tuple[str, object]]:
    """Names, with their stars, and defaults."""
    stars = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
    return [
        (stars.get(parameter.kind, '') + parameter.name, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
    ]


def check(name: str, ours: list[tuple[str, object]], published: list[tuple[str, object]]) -> None:
    ours_by_name = dict(ours)
    kept = []
    for parameter, default in published:
        same = parameter in ours_by_name and (
            ours_by_name[parameter] == default and type(ours_by_name[parameter]) is type(default)
        )
        if (name, parameter) in DEVIATIONS:
            assert not same, f'{name}: {parameter} deviates no longer'
        else:
            assert parameter in ours_by_name, f'{name} lacks {parameter}'
            assert same, f'{name}: {parameter}={ours_by_name[parameter]!r}, published {default!r}'
        if parameter in ours_by_name:
            kept.append(parameter)
    assert [parameter for parameter, _ in ours][: len(kept)] == kept, f'{name}: order'
    for parameter, default in ours[len(kept) :]:
        assert default is not NEEDED or parameter.startswith('*'), (
            f'{name}: {parameter}, which was not published, has no default'
        )


@pytest.mark.parametrize('name', NEW_MODULE_FUNCTIONS)
def test_functions_of_081(name):
    check(name, parameters(getattr(finetuner, name)), NEW_MODULE_FUNCTIONS[name])
    assert name in finetuner.__all__


@pytest.mark.parametrize('name', OLD_MODULE_FUNCTIONS)
def test_functions_of_041(name):
    check(name, parameters(getattr(finetuner, name)), OLD_MODULE_FUNCTIONS[name])
    assert name in finetuner.__all__


def test_fit_of_041():
    check('fit of a module', parameters(fit_own_model), OLD_FIT)
    assert parameters(finetuner.fit) != parameters(fit_own_model)


def test_fit_of_a_module_is_reached_through_the_public_name(tiny_network, vector_docs):
    """All of 0.4.1's parameters by position, as its users may have written them."""
    import torch

    before = [parameter.detach().clone() for parameter in tiny_network.parameters()]
    tuned = finetuner.fit(
        tiny_network,
        vector_docs,
        vector_docs,
        1,
        8,
        'TripletLoss',
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        1e-3,
        'epoch',
        'cpu',
        lambda doc: doc.tensor,
        None,
        2,
        None,
        0,
        False,
    )
    assert tuned is tiny_network
    after = list(tiny_network.parameters())
    assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize('name', RUN_METHODS)
def test_run(name):
    check(f'Run.{name}', parameters(getattr(Run, name)), RUN_METHODS[name])


@pytest.mark.parametrize('name', EXPERIMENT_METHODS)
def test_experiment(name):
    check(f'Experiment.{name}', parameters(getattr(Experiment, name)), EXPERIMENT_METHODS[name])


@pytest.mark.parametrize(
    ('handle', 'names'), [(Run, RUN_PROPERTIES), (Experiment, EXPERIMENT_PROPERTIES)]
)
def test_properties(handle, names):
    for name in names:
        assert isinstance(inspect.getattr_static(handle, name, None), property), name


@pytest.mark.parametrize('name', sorted(set(CALLBACKS) - set(ABSENT_CALLBACKS)))
def test_callbacks(name):
    ours = [
        (field.name, NEEDED if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(getattr(callback, name))
    ]
    check(name, ours, CALLBACKS[name])
    assert parameters(getattr(callback, name)) == ours
    assert finetuner.list_callbacks()[name] is getattr(callback, name)


def test_nothing_but_the_known_callbacks():
    published = set(CALLBACKS) - set(ABSENT_CALLBACKS)
    assert set(finetuner.list_callbacks()) == published | ADDED_CALLBACKS
    assert not set(CALLBACKS) & ADDED_CALLBACKS


def test_what_is_absent_is_listed_until_it_is_there():
    assert [name for name in ABSENT_FUNCTIONS if hasattr(finetuner, name)] == []
    assert [name for name in ABSENT_CALLBACKS if hasattr(callback, name)] == []


@pytest.mark.parametrize('name', ['ClassDataset', 'SessionDataset', 'InstanceDataset'])
def test_datasets_of_041(name):
    assert parameters(getattr(data, name)) == DATASET


@pytest.mark.parametrize('name', SAMPLERS)
def test_samplers_of_041(name):
    assert parameters(getattr(data, name)) == [*SAMPLERS[name], ('seed', None)]


def test_the_executor_of_081():
    """The `uses_with` of the published FinetunerExecutor."""
    ours = dict(parameters(FinetunerExecutor.__init__))
    for name, default in [
        ('token', None),
        # 32 there; None is what was measured to suit the device
        ('batch_size', None),
        ('select_model', None),
        ('device', None),
        ('logging_level', 'WARNING'),
    ]:
        assert ours[name] == default, name
    assert {'artifact', 'is_onnx'} <= set(ours)


def test_every_deviation_is_of_something_published():
    tables = {
        **NEW_MODULE_FUNCTIONS,
        **OLD_MODULE_FUNCTIONS,
        **{f'Run.{name}': table for name, table in RUN_METHODS.items()},
        **{f'Experiment.{name}': table for name, table in EXPERIMENT_METHODS.items()},
        **CALLBACKS,
        'fit of a module': OLD_FIT,
    }
    for name, parameter in DEVIATIONS:
        assert parameter in dict(tables[name]), (name, parameter)
