"""What `finetuner export` is told: texts such as `encoder=2`, checked before anything is made."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from finetuner.excepts import ConfigError, unknown_name

# what Kubernetes takes as the name of a Service, which becomes a host name
_NAME = re.compile('[a-z](?:[-a-z0-9]{0,50}[a-z0-9])?')
_CPU = re.compile(r'[0-9]+(?:\.[0-9]{1,3})?|[0-9]+m')
_BYTES = re.compile(r'([0-9]+(?:\.[0-9]+)?)(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P|)')
_PATH = '[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*'
_IMAGE = re.compile(
    rf'(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]+)?/)?{_PATH}(?:/{_PATH})*'
    r'(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?'
)


def by_executor(option: str, given: Sequence[str], names: Collection[str]) -> dict[str, str]:
    """Read texts such as `encoder=2`.

    Args:
        option: its name, for messages.
        given: the texts.
        names: of the Executors that there are, and `gateway`.

    Returns:
        What stands behind each name's equals sign.

    Raises:
        ConfigError: a text has no equals sign, or names something twice or that is not there.
    """
    found: dict[str, str] = {}
    for text in given:
        name, sign, value = text.partition('=')
        if not sign or not name or not value:
            raise ConfigError(f'{option} {text!r} is not NAME=VALUE, such as {option} encoder=2')
        if name not in names:
            raise ConfigError(f'{option} {text!r}: {unknown_name("Executor", name, names)}')
        if name in found:
            raise ConfigError(f'{option} names {name!r} twice: {found[name]!r} and {value!r}')
        found[name] = value
    return found


def whole_number(option: str, text: str, least: int = 1) -> int:
    """Read a whole number, or raise a ConfigError that names the option."""
    if not re.fullmatch('[0-9]{1,6}', text) or int(text) < least:
        raise ConfigError(f'{option} {text!r} is not a whole number from {least} on')
    return int(text)


def span(option: str, text: str) -> tuple[int, int]:
    """Read `1:5`, fewest and most, or raise a ConfigError that names the option."""
    low, colon, high = text.partition(':')
    if not colon:
        raise ConfigError(f'{option} {text!r} is not FEWEST:MOST, such as 1:5')
    fewest, most = whole_number(option, low), whole_number(option, high)
    if most <= fewest:
        raise ConfigError(f'{option} {text!r}: the second number must be larger than the first')
    return fewest, most


def range_of(option: str, text: str) -> tuple[int, int]:
    """Read `1:4`, fewest and most, from `0:1` on, or raise a ConfigError that names the option."""
    low, colon, high = text.partition(':')
    if not colon:
        raise ConfigError(f'{option} {text!r} is not FEWEST:MOST, such as 1:4 or 2:2')
    fewest, most = whole_number(option, low, least=0), whole_number(option, high)
    if most < fewest:
        raise ConfigError(f'{option} {text!r}: the second number must not be the smaller one')
    return fewest, most


def cpu_quantity(option: str, text: str) -> str:
    """Check an amount of CPU as Kubernetes writes it, such as `2`, `0.5` or `500m`."""
    if not _CPU.fullmatch(text) or num_cores(text) <= 0:
        raise ConfigError(f'{option} {text!r} is not an amount of CPU: 2, 0.5 and 500m are some')
    return text


def num_cores(quantity: str) -> float:
    """Cores of an amount of CPU: 0.5 of `500m`."""
    return float(quantity[:-1]) / 1000 if quantity.endswith('m') else float(quantity)


def byte_quantity(option: str, text: str) -> str:
    """Check an amount of memory or disk as Kubernetes writes it, such as `512Mi` or `10Gi`."""
    match = _BYTES.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f'{option} {text!r} is not an amount of bytes: 512Mi and 10Gi are some')
    return text


def num_bytes(quantity: str) -> int:
    """Bytes of an amount: 1024 of `1Ki`, 1000 of `1k`."""
    match = _BYTES.fullmatch(quantity)
    if match is None:
        raise ConfigError(f'{quantity!r} is not an amount of bytes')
    prefixes = ' kMGTP'
    base = 1024 if match[2].endswith('i') else 1000
    power = prefixes.index((match[2][:1] or ' ').replace('K', 'k'))
    return int(float(match[1]) * base**power)


def image_name(option: str, text: str) -> str:
    """Check the name of an image, such as `registry.example/finetuner:1.0`."""
    if not _IMAGE.fullmatch(text):
        raise ConfigError(
            f'{option} {text!r} is not the name of an image: finetuner:1.0 and '
            'registry.example/team/finetuner:1.0 are some'
        )
    return text


def host_name(what: str, text: str) -> str:
    """Check a name that becomes part of a host's name in a cluster.

    Args:
        what: it is the name of, for messages.
        text: the name; underscores and capital letters are Jina's to change.

    Returns:
        The name as Jina writes it.
    """
    compatible = text.replace('/', '-').replace('_', '-').lower()
    if not _NAME.fullmatch(compatible):
        raise ConfigError(
            f'{what} {text!r} cannot be part of a host name: take letters, digits and dashes, a '
            'letter first, 52 at most'
        )
    return compatible
