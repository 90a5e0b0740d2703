"""Every error this library raises on purpose, and the words it uses for unknown names."""

from collections.abc import Iterable
from difflib import get_close_matches

# characters of a name; what is longer is no mistyped one
_MOST_SHOWN = 200


class FinetunerError(Exception):
    """Base of all errors raised on purpose: its message is meant for the user's eyes."""


class ConfigError(FinetunerError, ValueError):
    """An argument of `fit`, an option or a setting is unknown or out of range."""


class DataError(FinetunerError, ValueError):
    """Documents cannot be trained on, evaluated or encoded as they are."""


class ContentError(DataError):
    """A Document's content is not what a model takes, or cannot be read."""


class PictureError(ContentError):
    """A picture cannot be opened: unreadable, empty, too large or of a format not allowed."""


class ArtifactError(FinetunerError, ValueError):
    """An artifact is missing, incomplete, tampered with or not an artifact at all."""


class NotFoundError(FinetunerError, LookupError):
    """A run, experiment, artifact or data set of that name does not exist."""


class ConflictError(FinetunerError, ValueError):
    """The request contradicts what is already there: a name taken, a run still going."""


class ForbiddenError(FinetunerError):
    """Whoever asks may not do this."""


class TooLargeError(FinetunerError, ValueError):
    """A request is larger than the server takes: in bytes, Documents, characters or tokens."""


class TooManyRequestsError(FinetunerError):
    """The server has as much to do as it may put off: ask again later.

    Attributes:
        retry_after: seconds after which asking again makes sense.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        """Keep both; an Executor's error reaches its gateway as `args`, written as texts."""
        super().__init__(message, retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        """The message alone."""
        return str(self.args[0])


class DeadlineError(FinetunerError):
    """The time that a request may take was over before its answer was there."""


class ServerError(FinetunerError):
    """The server cannot be reached, or failed."""


class TrainingError(FinetunerError):
    """Training cannot go on: the loss is not a number, the process was ended."""


class TrainingPausedError(TrainingError):
    """Training was asked to stop at a checkpoint, from which it can go on."""


# what such an error begins with, in the output of a process too
RANK_LOST = 'another process of this training has ended or does not answer'


class RankLostError(TrainingError):
    """Another process of the same training has ended, so this one cannot go on."""


class CheckpointError(TrainingError):
    """A checkpoint is damaged, of another version, or of another training."""


class RunPreparingError(FinetunerError):
    """The run has not started yet, so there is nothing of it to read."""


class RunInProgressError(FinetunerError):
    """The run has not finished yet, so its artifact and metrics do not exist."""


class RunFailedError(FinetunerError):
    """The run failed, so its artifact and metrics do not exist."""


def unknown_name(kind: str, name: object, choices: Iterable[str]) -> str:
    """Say that a name is unknown, with the nearest known names first.

    Args:
        kind: what the name stands for, such as `'loss'`.
        name: what came.
        choices: all that is allowed.

    Returns:
        One sentence: what came, the nearest names, and all of them when they are few.
    """
    known = sorted(choices)
    if isinstance(name, str) and len(name) > _MOST_SHOWN:
        name = f'{name[:_MOST_SHOWN]}...'
    by_lower_case = {choice.lower(): choice for choice in known}
    nearest = [
        by_lower_case[match]
        for match in get_close_matches(str(name).lower(), list(by_lower_case), n=3, cutoff=0.5)
    ]
    message = f'unknown {kind} {name!r}'
    hint = ' or '.join(repr(match) for match in nearest)
    message += f': did you mean {hint}?' if nearest else '.'
    if len(known) <= 60:
        message += f' Known: {", ".join(known) or "none"}.'
    return message
