"""The four states of a run, and its place in a queue; importing this costs nothing."""

from typing import Literal

CREATED: Literal['CREATED'] = 'CREATED'
STARTED: Literal['STARTED'] = 'STARTED'
FINISHED: Literal['FINISHED'] = 'FINISHED'
FAILED: Literal['FAILED'] = 'FAILED'

GOING = (CREATED, STARTED)
ENDED = (FINISHED, FAILED)

# of a run that a server's worker does: whether it waits for one, or has one
WAITING: Literal['WAITING'] = 'WAITING'
TAKEN: Literal['TAKEN'] = 'TAKEN'
