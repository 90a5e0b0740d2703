"""The four states of a run; this module imports nothing, so that asking for a status costs nothing."""

from typing import Literal

CREATED: Literal['CREATED'] = 'CREATED'
STARTED: Literal['STARTED'] = 'STARTED'
FINISHED: Literal['FINISHED'] = 'FINISHED'
FAILED: Literal['FAILED'] = 'FAILED'

GOING = (CREATED, STARTED)
ENDED = (FINISHED, FAILED)
