"""What a run is told (`RunConfig`) and where things are kept (`Settings`): checked once, then frozen."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, Field, ValidationError, validator

from finetuner.excepts import ConfigError, unknown_name

OPTIMIZERS = (
    'Adadelta',
    'Adafactor',
    'Adagrad',
    'Adam',
    'AdamW',
    'Adamax',
    'ASGD',
    'LBFGS',
    'Muon',
    'NAdam',
    'RAdam',
    'RMSprop',
    'Rprop',
    'SGD',
)
SCHEDULERS = (
    'linear',
    'cosine',
    'cosine_with_restarts',
    'polynomial',
    'constant',
    'constant_with_warmup',
)


def whole_number(value: Any) -> int:
    """Make an int of an int, or of a float that is one.

    Raises:
        TypeError: it is no number.
        ValueError: it has a fraction, or is infinite or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f'{value!r} is not a whole number')
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f'{value!r} is not a whole number')
    return int(value)


def whole_number_fields(*names: str) -> Any:
    """Make a pydantic validator of int fields: 5.0, as protobuf gives ints, is 5; 5.5 is refused.

    Left to itself, pydantic cuts 5.5 to 5 and takes True for 1.
    """

    def check(value: Any) -> int | None:
        return None if value is None else whole_number(value)

    return validator(*names, pre=True, allow_reuse=True)(check)


class CallbackConfig(BaseModel):
    """A callback by name with its options; Documents in options stand there as data references."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    class Config:
        """Frozen, nothing unknown."""

        frozen = True
        extra = 'forbid'

    @validator('options', pre=True)
    def _floats_that_are_whole(cls, value: Any) -> Any:
        return {} if value is None else whole_numbers(value)


class RunConfig(BaseModel):
    """All a run needs to know, in plain JSON values: the arguments of `fit`, validated and frozen.

    `train_data`, `eval_data` and the `query_data`/`index_data` options of callbacks are references
    to stored Documents (`sha256:...` or a pushed name), never the Documents themselves.
    """

    model: str = 'efficientnet-lite0'
    train_data: str
    eval_data: str | None = None
    val_split: float = Field(0.0, ge=0.0, lt=1.0)
    model_artifact: str | None = None
    run_name: str | None = None
    description: str = ''
    experiment_name: str = 'default'
    model_options: dict[str, Any] = Field(default_factory=dict)
    loss: str | None = None
    loss_options: dict[str, Any] = Field(default_factory=dict)
    miner: str | None = None
    miner_options: dict[str, Any] = Field(default_factory=dict)
    optimizer: str = 'Adam'
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    learning_rate: float | None = Field(None, gt=0.0, lt=float('inf'))
    epochs: int = Field(5, ge=1)
    batch_size: int | None = Field(None, ge=2)
    callbacks: tuple[CallbackConfig, ...] = ()
    scheduler: str | None = None
    scheduler_options: dict[str, Any] = Field(default_factory=dict)
    freeze: bool = False
    output_dim: int | None = Field(None, ge=1)
    device: Literal['cuda', 'cpu'] = 'cuda'
    num_workers: int = Field(4, ge=0)
    to_onnx: bool = False
    public: bool = False
    num_items_per_class: int = Field(4, ge=1)
    sampler: Literal['auto', 'class', 'random'] = 'auto'
    loss_optimizer: str | None = None
    loss_optimizer_options: dict[str, Any] = Field(default_factory=dict)
    freeze_batch_norm: bool | None = None
    augmentation: Literal['none', 'light', 'strong'] | None = None
    whiten: bool | None = None
    views_per_instance: int = Field(2, ge=2)
    on_broken: Literal['stop', 'skip'] = 'stop'
    seed: int = Field(0, ge=0, lt=2**32)
    micro_batch_size: int | None = Field(None, ge=1)
    matryoshka_dims: tuple[int, ...] = ()
    hard_negatives: bool = False
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    precision: Literal['auto', 'fp32', 'bf16', 'fp16'] = 'auto'
    compile_model: bool = False
    checkpoint_seconds: float = Field(300.0, gt=0.0)
    export_precision: Literal['fp32', 'int8', 'auto'] = 'fp32'
    max_recall_loss: float = Field(0.01, ge=0.0, lt=1.0)
    num_processes: int = Field(1, ge=1)
    num_nodes: int = Field(1, ge=1)

    class Config:
        """Frozen, nothing unknown."""

        frozen = True
        extra = 'forbid'

    _whole_numbers = whole_number_fields(
        'epochs',
        'batch_size',
        'output_dim',
        'num_workers',
        'num_items_per_class',
        'views_per_instance',
        'seed',
        'micro_batch_size',
        'num_processes',
        'num_nodes',
    )

    @validator(
        'model_options',
        'loss_options',
        'miner_options',
        'optimizer_options',
        'scheduler_options',
        'loss_optimizer_options',
        pre=True,
    )
    def _none_is_no_options(cls, value: Any) -> Any:
        return {} if value is None else whole_numbers(value)

    @validator('matryoshka_dims', pre=True)
    def _dims_are_whole(cls, value: Any) -> Any:
        return () if value is None else tuple(whole_number(item) for item in value)

    @validator('description', 'experiment_name', 'callbacks', pre=True)
    def _none_is_the_default(cls, value: Any, field: Any) -> Any:
        return field.default if value is None else value

    @validator('optimizer', 'loss_optimizer')
    def _optimizer_is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in OPTIMIZERS:
            raise ValueError(unknown_name('optimizer', value, OPTIMIZERS))
        return value

    @validator('scheduler')
    def _scheduler_is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in SCHEDULERS:
            raise ValueError(unknown_name('scheduler', value, SCHEDULERS))
        return value

    @validator('num_nodes')
    def _nodes_have_equal_shares(cls, value: int, values: dict[str, Any]) -> int:
        num_processes = values.get('num_processes', value)
        if num_processes % value:
            raise ValueError(
                f'{num_processes} processes cannot be divided evenly among {value} nodes: make '
                'num_processes, which counts those of all nodes, a multiple of num_nodes'
            )
        return value

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> RunConfig:
        """Validate the arguments of `fit`, as Python or a request gave them.

        Args:
            parameters: names and plain JSON values.

        Returns:
            The frozen config.

        Raises:
            ConfigError: a name is unknown (the nearest is suggested) or a value out of range.
        """
        for name in parameters:
            if name not in cls.__fields__:
                raise ConfigError(unknown_name('parameter', name, cls.__fields__))
        try:
            return cls(**parameters)
        except ValidationError as error:
            raise ConfigError(explain(error)) from error


def explain(error: ValidationError) -> str:
    """One line for each thing pydantic found wrong, with the argument's name first."""
    lines = []
    for problem in error.errors():
        where = '.'.join(str(part) for part in problem['loc'])
        permitted = problem.get('ctx', {}).get('permitted')
        allowed = f' (allowed: {", ".join(map(str, permitted))})' if permitted else ''
        message = 'unexpected value' if permitted else problem['msg']
        lines.append(f'{where}: {message}{allowed}')
    return '; '.join(lines)


def whole_numbers(value: Any) -> Any:
    """Turn floats that are whole numbers back to ints, deep in options.

    Protobuf knows no ints: 4 arrives as 4.0, and most options that are floats take an int as well.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: whole_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole_numbers(item) for item in value]
    return value


LAUNCHERS = ('process', 'ray')


@dataclass(frozen=True)
class RaySettings:
    """The Ray cluster that runs go to, and what each process of a run gets there.

    Attributes:
        address: of its jobs API, such as `http://127.0.0.1:8265`.
        num_cpus: of each process; it computes with so many threads.
        num_gpus: of each process.
    """

    address: str
    num_cpus: float = 1.0
    num_gpus: float = 0.0

    @classmethod
    def from_environment(cls) -> RaySettings:
        """Read FINETUNER_RAY_ADDRESS, FINETUNER_RAY_CPUS and FINETUNER_RAY_GPUS.

        Raises:
            ConfigError: there is no address, or a number is none.
        """
        address = os.environ.get('FINETUNER_RAY_ADDRESS', '').strip()
        if not address:
            raise ConfigError(
                'FINETUNER_LAUNCHER=ray needs FINETUNER_RAY_ADDRESS, the address of the jobs API '
                'of a Ray cluster, such as http://127.0.0.1:8265'
            )
        return cls(address, _amount('CPUS', 1.0, above=True), _amount('GPUS', 0.0, above=False))


def _amount(name: str, default: float, above: bool) -> float:
    variable = f'FINETUNER_RAY_{name}'
    given = os.environ.get(variable, '').strip()
    try:
        amount = float(given or default)
    except ValueError:
        amount = math.nan
    if not (amount > 0 or (amount == 0 and not above)) or math.isinf(amount):
        least = 'above 0' if above else 'of 0 or more'
        raise ConfigError(f'{variable}={given!r}: it takes a number {least}, for each process')
    return amount


@dataclass(frozen=True)
class Settings:
    """Where runs, data and artifacts are kept, who does runs, and what else a server shows.

    Attributes:
        home: directory of everything that has no address of its own.
        database_url: SQLAlchemy address of the run store.
        artifacts_url: fsspec address of the artifacts and pushed data.
        columns: SQLite files of datasets that are declared as classes; pages show them.
        ray: the cluster that runs go to; None for processes of this machine.
    """

    home: Path
    database_url: str
    artifacts_url: str
    columns: tuple[Path, ...] = ()
    ray: RaySettings | None = None

    @property
    def launcher(self) -> str:
        """What starts runs: `process` or `ray`."""
        return 'process' if self.ray is None else 'ray'

    @classmethod
    def from_environment(cls, home: str | Path | None = None) -> Settings:
        """Read FINETUNER_HOME, _DATABASE_URL, _ARTIFACTS_URL, _COLUMNS, and _LAUNCHER with _RAY_*.

        Args:
            home: overrides FINETUNER_HOME, whose default is `~/.finetuner`.

        Raises:
            ConfigError: FINETUNER_LAUNCHER is neither `process` nor `ray`, or what goes with it is
                missing.
        """
        launcher = os.environ.get('FINETUNER_LAUNCHER') or 'process'
        if launcher not in LAUNCHERS:
            raise ConfigError(unknown_name('FINETUNER_LAUNCHER', launcher, LAUNCHERS))
        where = Path(home or os.environ.get('FINETUNER_HOME') or '~/.finetuner')
        where = where.expanduser().absolute()
        columns = os.environ.get('FINETUNER_COLUMNS', '').split(os.pathsep)
        return cls(
            home=where,
            database_url=os.environ.get('FINETUNER_DATABASE_URL')
            or 'sqlite:///' + quote(str(where / 'finetuner.db')),
            artifacts_url=os.environ.get('FINETUNER_ARTIFACTS_URL') or str(where / 'artifacts'),
            columns=tuple(Path(each).expanduser().absolute() for each in columns if each.strip()),
            ray=RaySettings.from_environment() if launcher == 'ray' else None,
        )
