"""The part of the local client that is about artifacts and the names that they have."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from finetuner.names import is_alias

if TYPE_CHECKING:
    from finetuner.runs.workspace import Workspace


class LocalArtifacts:
    """Artifacts of a workspace; where one is named by its id, an alias of it will do."""

    _workspace: Workspace

    def find_artifact(self, artifact_id: str) -> Path:
        """Local directory of a finished run's artifact.

        Raises:
            NotFoundError: there is no such artifact, and why as far as that is known.
        """
        return self._workspace.find_artifact(self._id_of(artifact_id))

    def download_artifact(self, artifact_id: str, directory: str | Path, run_name: str) -> str:
        """Write an artifact as `<directory>/<run_name>.zip`.

        Args:
            artifact_id: 24 hex characters, or an alias.
            directory: made when it is not there.
            run_name: names the archive; characters no file name should have become '_'.

        Returns:
            The archive's path.
        """
        return self._workspace.zip_artifact(self._id_of(artifact_id), Path(directory), run_name)

    def resolve_artifact(self, name: str) -> str:
        """The id of the artifact that a name stands for now; cheap enough to ask each second.

        Args:
            name: an alias, `name@label`; `name@latest` is the artifact of the newest finished run
                of the experiment `name`. An id stands for itself.

        Raises:
            NotFoundError: there is none, or it may not be read; the nearest aliases are given.
        """
        return self._workspace.name_artifact(name).artifact_id

    def set_alias(self, alias: str, artifact_id: str) -> dict:
        """Have an alias stand for an artifact; one that is there moves.

        Args:
            alias: `name@label`, any label but `latest`.
            artifact_id: of an own artifact or one that is shared; or another alias of it.

        Returns:
            alias, artifact_id, the run and experiment it comes from, updated_at.

        Raises:
            ConfigError: it is no alias, or `latest`, which cannot be set.
            NotFoundError: the artifact is not there, or may not be read.
        """
        return asdict(self._workspace.set_alias(alias, artifact_id))

    def list_aliases(self) -> list[dict]:
        """Aliases that were set, by name: alias, artifact_id, run, experiment, updated_at.

        An alias whose artifact is gone, or that no run made, has no run and experiment.
        """
        return [asdict(found) for found in self._workspace.runs.aliases.list()]

    def delete_alias(self, alias: str) -> None:
        """Forget an alias; its artifact stays.

        Raises:
            NotFoundError: there is none of that name; the nearest are given.
        """
        self._workspace.runs.aliases.delete(alias)

    def _id_of(self, artifact: str) -> str:
        return self.resolve_artifact(artifact) if is_alias(artifact) else artifact
