"""The handle on a run that `fit` and `get_run` return."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finetuner.excepts import ConfigError, RunFailedError, RunInProgressError, RunPreparingError
from finetuner.runs.states import CREATED, FAILED, GOING, STARTED

if TYPE_CHECKING:
    from finetuner.protocol import Client

ARTIFACTS_DIRECTORY = 'artifacts/'


class Run:
    """A run: its status, log, metrics and artifact, asked of the client at each call.

    Args:
        client: where the run lives.
        name: the run's name.
        experiment_name: the experiment the run belongs to.
        config: what the run was told.
        created_at: ISO time in UTC.
        description: free text.
        task: 'training'; runs that make data have another.
        train_data: name of the data that a run of another task made.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        experiment_name: str,
        config: dict,
        created_at: str,
        description: str = '',
        task: str = 'training',
        train_data: str | None = None,
    ) -> None:
        self._client = client
        self._name = name
        self._experiment_name = experiment_name
        self._config = config
        self._created_at = created_at
        self._description = description
        self._train_data = train_data
        self.task = task

    @classmethod
    def from_dict(cls, client: Client, run: dict[str, Any]) -> Run:
        """Make a handle of what a client's `fit`, `get_run` and `list_runs` return."""
        return cls(
            client=client,
            name=run['name'],
            experiment_name=run['experiment_name'],
            config=run['config'],
            created_at=run['created_at'],
            description=run['description'],
        )

    def __repr__(self) -> str:
        return f'Run(name={self._name!r}, experiment_name={self._experiment_name!r})'

    @property
    def name(self) -> str:
        """The run's name, unique within its experiment."""
        return self._name

    @property
    def experiment_name(self) -> str:
        """The experiment the run belongs to."""
        return self._experiment_name

    @property
    def config(self) -> dict:
        """What the run was told: the arguments of `fit`, data as references."""
        return self._config

    @property
    def created_at(self) -> str:
        """When the run was created, ISO time in UTC."""
        return self._created_at

    @property
    def description(self) -> str:
        """Free text given to `fit`."""
        return self._description

    @property
    def train_data(self) -> str:
        """Name of the data this run made.

        Raises:
            ConfigError: the run trains a model and makes no data.
        """
        if self._train_data is None:
            raise ConfigError(
                f"run '{self._name}' is a {self.task} run and makes no data; "
                "what it was trained on is in run.config['train_data']"
            )
        return self._train_data

    def status(self) -> dict:
        """Where the run stands, as `{'status': ..., 'details': ...}`.

        Returns:
            `status` is CREATED, STARTED, FINISHED or FAILED; `details` says why a run failed.
        """
        return self._client.get_run_status(self._experiment_name, self._name)

    def progress(self) -> dict[str, Any]:
        """How far the training is: epoch, batch, loss, images a second, seconds left."""
        return self._client.get_run(self._experiment_name, self._name)['progress']

    def logs(self) -> str:
        """The log so far, one line each.

        Raises:
            RunPreparingError: the run has not started.
        """
        if self.status()['status'] == CREATED:
            raise RunPreparingError(
                f"run '{self._name}' has not started yet: its log can be read from status "
                f'{STARTED} on, and stream_logs() waits for that'
            )
        return self._client.get_run_logs(self._experiment_name, self._name)

    def resume(self) -> None:
        """Go on with the run after it failed: its process was killed, or the run was cancelled.

        It goes on in a new worker from the last checkpoint, and ends as it would have ended had
        nothing happened, on the CPU to the last bit. Without a checkpoint it begins anew. Its log
        goes on.

        Raises:
            ConflictError: the run is going, or has finished.
        """
        self._client.resume_run(self._experiment_name, self._name)

    def checkpoints(self) -> dict[int, str]:
        """The models of single epochs that `TrainingCheckpoint` keeps, also of a going run.

        Returns:
            Paths of artifacts, for `get_model` and for `fit(model_artifact=...)`, by epoch from 1.
        """
        return self._client.get_run_checkpoints(self._experiment_name, self._name)

    def stream_logs(self, interval: int = 5) -> Iterator[str]:
        """Log lines as they come; waits for the run to start and ends when it ends.

        Args:
            interval: seconds between looks at a run that has not started, at most; one that
                starts sooner is noticed sooner.

        Returns:
            An iterator over lines; a failed run's last line says why it failed.
        """
        self._wait_for_start(interval)
        yield from self._client.stream_run_logs(self._experiment_name, self._name)

    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics of the evaluation data by stage, 'before' and 'after' fine-tuning.

        Under 'p_value' stands, for each metric, how probable a change of at least this size would
        be if the model were as good after as before; see docs/evaluation.md.

        Raises:
            RunInProgressError: the run has not ended.
            RunFailedError: the run failed.
        """
        self._check_finished('metrics')
        return self._client.get_run_metrics(self._experiment_name, self._name)

    def display_metrics(self) -> None:
        """Print the metrics before and after fine-tuning as tables, and whether they changed."""
        from finetuner.console import print_changes, print_metrics

        metrics = self.metrics()
        p_values = metrics.pop('p_value', None)
        for stage, values in metrics.items():
            print_metrics(stage, values)
        if p_values:
            print_changes(metrics['before'], metrics['after'], p_values)

    def example_results(self) -> dict[str, Any]:
        """Results of a few evaluation queries by stage, 'before' and 'after' fine-tuning.

        Raises:
            RunInProgressError: the run has not ended.
            RunFailedError: the run failed.
        """
        self._check_finished('example results')
        return self._client.get_run_examples(self._experiment_name, self._name)

    def display_examples(self, k: int = 5) -> None:
        """Print the results of a few evaluation queries before and after fine-tuning.

        Args:
            k: results shown for each query, at most.
        """
        from finetuner.console import print_examples

        for stage, results in self.example_results().items():
            print_examples(stage, results, k=k)

    def save_artifact(self, directory: str = ARTIFACTS_DIRECTORY) -> str:
        """Write the artifact as a zip archive.

        Args:
            directory: where to; made when it is not there.

        Returns:
            The path of `<directory>/<name of the run>.zip`.

        Raises:
            RunInProgressError: the run has not ended.
            RunFailedError: the run failed.
        """
        return self._client.download_artifact(self.artifact_id, directory, self._name)

    @property
    def artifact_id(self) -> str:
        """Name of the tuned model, for `get_model` and `FinetunerExecutor`: 24 hex characters.

        Raises:
            RunInProgressError: the run has not ended.
            RunFailedError: the run failed.
        """
        self._check_finished('artifact')
        return self._client.get_run(self._experiment_name, self._name)['artifact_id']

    def _wait_for_start(self, interval: float) -> None:
        if self.status()['status'] != CREATED:
            return
        from finetuner.console import console

        pause = 0.1
        with console.status(f"run '{self._name}' is {CREATED}, waiting for it to start"):
            while self.status()['status'] == CREATED:
                time.sleep(min(pause, interval))
                pause = min(2 * pause, 0.5)

    def _check_finished(self, what: str) -> None:
        state = self.status()
        if state['status'] in GOING:
            raise RunInProgressError(
                f"run '{self._name}' is {state['status']}: its {what} can be read when it has "
                'finished; stream_logs() waits for that'
            )
        if state['status'] == FAILED:
            raise RunFailedError(
                f"run '{self._name}' failed, so there is no {what}: {state['details']} "
                '(logs() tells more)'
            )
