"""Names for runs that were given none, and the two forms in which artifacts are named."""

import re
import secrets

ARTIFACT_ID = re.compile(r'[0-9a-f]{24}')

_QUALITIES = (
    'amber', 'ample', 'bold', 'brisk', 'calm', 'clear', 'copper', 'crisp', 'dapper', 'early',
    'even', 'fair', 'fleet', 'gentle', 'glad', 'golden', 'hardy', 'honest', 'ivory', 'jolly',
    'keen', 'kind', 'level', 'lively', 'lucid', 'mellow', 'merry', 'mild', 'neat', 'nimble',
    'olive', 'patient', 'plain', 'polite', 'quick', 'quiet', 'ready', 'round', 'sage', 'silver',
    'snug', 'sober', 'steady', 'sunny', 'tidy', 'true', 'vivid', 'warm', 'wise', 'young',
)  # fmt: skip
_THINGS = (
    'acorn', 'alder', 'anchor', 'aspen', 'badger', 'basalt', 'beacon', 'birch', 'bramble', 'brook',
    'cedar', 'clover', 'cobalt', 'comet', 'coral', 'crane', 'dune', 'ember', 'falcon', 'fern',
    'finch', 'fjord', 'glade', 'harbor', 'hazel', 'heron', 'juniper', 'kestrel', 'lagoon', 'lantern',
    'larch', 'lark', 'lichen', 'maple', 'marten', 'meadow', 'opal', 'orchard', 'otter', 'pebble',
    'plover', 'quartz', 'reed', 'ridge', 'rowan', 'sparrow', 'thistle', 'tundra', 'walnut', 'willow',
)  # fmt: skip


def is_alias(name: str) -> bool:
    """Whether something has the form of a name for an artifact, `name@label`."""
    before, _, after = name.rpartition('@')
    return bool(before and after)


def random_run_name() -> str:
    """A name easy to say and unlikely to be taken, such as 'quiet-heron-4821'.

    It does not come from the seeded generators: two runs with one seed get two names.
    """
    number = secrets.randbelow(9000) + 1000
    return f'{secrets.choice(_QUALITIES)}-{secrets.choice(_THINGS)}-{number}'
