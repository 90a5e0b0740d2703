"""Reading the `parameters` of a request, where every number is a float and every name a guess."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from finetuner.config import whole_number
from finetuner.excepts import ConfigError, unknown_name


class Parameters:
    """The parameters of one request, checked against the names its endpoint knows."""

    def __init__(self, given: Mapping[str, Any], known: Collection[str], executor: str) -> None:
        """Refuse what the endpoint does not know.

        Args:
            given: as Jina hands them over.
            known: names the endpoint takes.
            executor: name of the Executor, under which Jina lets clients nest parameters.

        Raises:
            ConfigError: a name is unknown; the nearest are suggested.
        """
        self.values: dict[str, Any] = {}
        for name, value in given.items():
            if name.startswith('__') or (name == executor and isinstance(value, Mapping)):
                continue  # Jina's own, already unpacked
            if name not in known:
                raise ConfigError(unknown_name('parameter', name, known))
            if value is not None:
                self.values[name] = value

    def pop_text(self, name: str, default: str | None = None) -> str | None:
        """Take a text out.

        Raises:
            ConfigError: it is something else, or empty.
        """
        value = self.values.pop(name, default)
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f'parameter {name!r} is {value!r}: it takes a text')
        return value

    def pop_needed_text(self, name: str) -> str:
        """Take out a text that must be there.

        Raises:
            ConfigError: it is missing, empty or something else.
        """
        value = self.pop_text(name)
        if value is None:
            raise ConfigError(f"parameter {name!r} is missing: parameters={{'{name}': ...}}")
        return value

    def pop_flag(self, name: str, default: bool = False) -> bool:
        """Take a true or false out.

        Raises:
            ConfigError: it is something else.
        """
        value = self.values.pop(name, default)
        if value not in (True, False):
            raise ConfigError(f'parameter {name!r} is {value!r}: it takes true or false')
        return bool(value)

    def pop_whole_number(
        self, name: str, default: int | None = None, minimum: int = 1
    ) -> int | None:
        """Take a whole number out; 5.0, as protobuf sends it, is 5.

        Raises:
            ConfigError: it is something else or below the minimum.
        """
        value = self.values.pop(name, None)
        if value is None:
            return default
        try:
            number = whole_number(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f'parameter {name!r} is {value!r}: it takes a whole number'
            ) from error
        if number < minimum:
            raise ConfigError(f'parameter {name!r} is {number}: it takes {minimum} or more')
        return number

    def pop_choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Take one of a few words out; the first is the default.

        Raises:
            ConfigError: it is another word.
        """
        value = self.values.pop(name, choices[0])
        if value not in choices:
            raise ConfigError(unknown_name(f'value of parameter {name!r}:', value, choices))
        return value
