"""One protocol for everything that submits and reads runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from docarray import Document


class Client(Protocol):
    """What the user handles, the command line and the Executors ask of a client, local or remote.

    Runs, experiments and so on are plain JSON values. Errors are those of `finetuner.excepts`:
    `NotFoundError` for unknown names, `ConflictError` for what contradicts the state of things,
    `ConfigError` and `DataError` for bad arguments.
    """

    def push_data(
        self, docs: Sequence[Document], name: str | None = None, public: bool = False
    ) -> str:
        """Store Documents by content, under a name too when one is given; returns `sha256:...`."""

    def load_data(self, reference: str) -> Sequence[Document]:
        """Read stored Documents by `sha256:...` or by name."""

    def list_data(self) -> list[dict]:
        """Named data, newest first: name, data, num_documents, num_bytes, public, created_at."""

    def forget_data(self, name: str) -> None:
        """Forget a name; runs that were trained on the data keep it."""

    def fit(
        self, parameters: Mapping[str, Any], data: Mapping[str, Sequence[Document] | str]
    ) -> dict:
        """Validate, store the data, create the run and start it; returns the run."""

    def get_run(self, experiment_name: str, run_name: str) -> dict:
        """Name, experiment, status, details, config, times, artifact_id, progress of a run."""

    def list_runs(
        self, experiment_name: str | None = None, page: int = 1, size: int = 50
    ) -> list[dict]:
        """Runs, newest first, one page of them."""

    def delete_run(self, experiment_name: str, run_name: str) -> None:
        """Delete an ended run with its artifact, log and metrics."""

    def delete_runs(self, experiment_name: str | None = None) -> None:
        """Delete all runs, of one experiment or of all."""

    def cancel_run(self, experiment_name: str, run_name: str) -> dict:
        """End a run that is going; it becomes FAILED with details 'cancelled'."""

    def resume_run(self, experiment_name: str, run_name: str) -> dict:
        """Go on with a FAILED run, from its last checkpoint or, without one, from the start."""

    def get_run_checkpoints(self, experiment_name: str, run_name: str) -> dict[int, str]:
        """Paths of the artifacts that `TrainingCheckpoint` keeps, by epoch from 1."""

    def get_run_status(self, experiment_name: str, run_name: str) -> dict:
        """`{'status': ..., 'details': ...}`."""

    def get_run_logs(self, experiment_name: str, run_name: str) -> str:
        """All log lines so far."""

    def read_run_logs(
        self, experiment_name: str, run_name: str, after: int = 0
    ) -> list[tuple[int, str]]:
        """Log lines with their ids, those after an id."""

    def stream_run_logs(self, experiment_name: str, run_name: str) -> Iterator[str]:
        """Log lines as they come; ends when the run has ended and all are out."""

    def get_run_metrics(self, experiment_name: str, run_name: str) -> dict[str, dict[str, float]]:
        """Evaluation metrics by stage, 'before' and 'after'."""

    def get_run_examples(self, experiment_name: str, run_name: str) -> dict[str, dict[str, Any]]:
        """Results of example queries by stage, 'before' and 'after'."""

    def get_run_curves(self, experiment_name: str, run_name: str) -> dict[str, list[list[Any]]]:
        """Values measured while training: for each name a list of [step, epoch, value]."""

    def share_run(self, experiment_name: str, run_name: str, public: bool) -> dict:
        """Show a run, its log, metrics and artifact to all users of a server, or stop that."""

    def create_experiment(self, name: str, description: str = '') -> dict:
        """Create an experiment."""

    def get_experiment(self, name: str) -> dict:
        """Name, status, description, created_at, owner and number of runs."""

    def list_experiments(self, page: int = 1, size: int = 50) -> list[dict]:
        """Experiments, newest first, one page of them."""

    def delete_experiment(self, name: str) -> dict:
        """Delete an experiment and all its runs; returns what it was."""

    def delete_experiments(self) -> list[dict]:
        """Delete all experiments and all runs; returns what they were."""

    def find_artifact(self, artifact_id: str) -> Path:
        """Local directory of an artifact, given by its id or an alias."""

    def download_artifact(self, artifact_id: str, directory: str | Path, run_name: str) -> str:
        """Write an artifact as a zip archive into a directory; returns the archive's path."""

    def resolve_artifact(self, name: str) -> str:
        """The id of the artifact that an alias, `name@label`, stands for now; an id is itself.

        `name@latest` is the artifact of the newest finished run of the experiment `name`. Cheap
        enough to ask each second.
        """

    def set_alias(self, alias: str, artifact_id: str) -> dict:
        """Have an alias stand for an artifact; one that is there moves."""

    def list_aliases(self) -> list[dict]:
        """Aliases that were set: alias, artifact_id, run, experiment, updated_at."""

    def delete_alias(self, alias: str) -> None:
        """Forget an alias; its artifact stays."""

    def close(self) -> None:
        """Let go of the database; runs go on."""
