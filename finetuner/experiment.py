"""The handle on an experiment, a named group of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from docarray import DocumentArray

from finetuner.client import Client, callback_parameters
from finetuner.excepts import ConfigError
from finetuner.run import Run

if TYPE_CHECKING:
    from collections.abc import Iterable


class Experiment:
    """An experiment: the runs that belong together.

    Args:
        client: where the experiment lives.
        name: the experiment's name.
        status: ACTIVE.
        created_at: ISO time in UTC.
        description: free text.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        status: str,
        created_at: str,
        description: str | None = '',
    ) -> None:
        self._client = client
        self._name = name
        self._status = status
        self._created_at = created_at
        self._description = description

    @classmethod
    def from_dict(cls, client: Client, experiment: dict[str, Any]) -> Experiment:
        """Make a handle of what a client's `get_experiment` and `list_experiments` return."""
        return cls(
            client=client,
            name=experiment['name'],
            status=experiment['status'],
            created_at=experiment['created_at'],
            description=experiment['description'],
        )

    def __repr__(self) -> str:
        return f'Experiment(name={self._name!r})'

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._name

    @property
    def status(self) -> str:
        """ACTIVE: an experiment that exists can take runs."""
        return self._status

    @property
    def created_at(self) -> str:
        """When the experiment was created, ISO time in UTC."""
        return self._created_at

    @property
    def description(self) -> str:
        """Free text given at creation."""
        return self._description or ''

    def get_run(self, name: str) -> Run:
        """The run of that name.

        Raises:
            NotFoundError: no such run in this experiment; the nearest names are given.
        """
        return Run.from_dict(self._client, self._client.get_run(self._name, name))

    def list_runs(self, page: int = 1, size: int = 50) -> list[Run]:
        """One page of this experiment's runs, newest first.

        Args:
            page: 1 is the first.
            size: runs on a page, 1 to 100.
        """
        runs = self._client.list_runs(self._name, page=page, size=size)
        return [Run.from_dict(self._client, run) for run in runs]

    def delete_run(self, name: str) -> None:
        """Delete an ended run with its artifact, log and metrics.

        Raises:
            ConflictError: the run is still going.
        """
        self._client.delete_run(self._name, name)

    def delete_runs(self) -> None:
        """Delete all runs of this experiment.

        Raises:
            ConflictError: one of them is still going; then none is deleted.
        """
        self._client.delete_runs(self._name)

    def create_training_run(
        self,
        model: str,
        train_data: str | DocumentArray,
        run_name: str | None = None,
        eval_data: str | DocumentArray | None = None,
        csv_options: Any = None,
        callbacks: Iterable[Any] | None = None,
        **parameters: Any,
    ) -> Run:
        """Start a run in this experiment.

        Args:
            model: name of the backbone.
            train_data: labelled Documents, or the reference or name of stored ones.
            run_name: made up when None.
            eval_data: Documents for the evaluation loss.
            csv_options: for training data in CSV files; not there yet.
            callbacks: instances of the classes in `finetuner.callback`.
            parameters: any other argument of `finetuner.fit`; an unknown one is a ConfigError.

        Returns:
            The run's handle, at once.

        Raises:
            ConfigError: an argument is unknown, out of range or contradicts another.
            DataError: the Documents cannot be trained or evaluated on; says which and why.
        """
        if csv_options is not None:
            raise ConfigError('csv_options: CSV files are not read yet; give a DocumentArray')
        configs, data = callback_parameters(callbacks)
        data['train_data'] = train_data
        if eval_data is not None:
            data['eval_data'] = eval_data
        # `parameters` goes no further than the client's check against RunConfig.
        own = {
            'model': model,
            'run_name': run_name,
            'callbacks': configs,
            'experiment_name': self._name,
        }
        return Run.from_dict(self._client, self._client.fit({**parameters, **own}, data))
