"""Whether a change of retrieval metrics is more than chance: a paired test over the queries."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

# what is kept of an evaluation: metrics before and after training, p-values of the change
Stage = Literal['before', 'after', 'p_value']

_LEAST_SHOWN = 0.001
_ROUNDING = 1e-12


def paired_p_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Test for each metric whether its mean over the queries changed by more than chance.

    The two-sided paired t-test, as `ranx` has it. Smucker, Allan and Carterette (A Comparison of
    Statistical Significance Tests for Information Retrieval Evaluation, 2007) find that it agrees
    with Fisher's randomisation test.

    Where all queries changed by the same amount the t statistic is not defined, and the p-value is
    that of the exact randomisation test: of the `2 ** num_queries` ways to swap before and after,
    two give a change as large. So it is 1 with one query, and 1 where nothing changed.

    Args:
        before: `[num_queries]` float by metric, as `finetuner.evaluation.evaluate_queries` gives.
        after: the same metrics of the same queries in the same order.

    Returns:
        By metric, in 0..1 and never nan: how probable a change of at least this size would be if
        before and after were equally good.

    Raises:
        ValueError: the two are not of the same queries.
    """
    pairs = {name: (np.asarray(before[name]), np.asarray(after[name])) for name in after}
    for name, (old, new) in pairs.items():
        if old.shape != new.shape or old.ndim != 1 or not len(old):
            raise ValueError(f'{name}: {old.shape} before and {new.shape} after, not [num_queries]')
    return {name: _p_value(old, new) for name, (old, new) in pairs.items()}


def _p_value(before: np.ndarray, after: np.ndarray) -> float:
    differences = after - before
    if np.ptp(differences) <= _ROUNDING:
        return 1.0 if abs(differences[0]) <= _ROUNDING else 2.0 ** (1 - len(differences))
    return float(load_paired_test()(before, after)[0])


@functools.cache
def load_paired_test() -> Callable[..., Any]:
    """Import the test, which takes a second, most of it for numba, which the test does not use.

    ranx's randomisation test would compile for several seconds and gives another p-value at each
    call, as its seed does not reach the threads it runs on.

    Returns:
        Takes `[num_queries]` before and after, gives the p-value first.
    """
    kept = os.environ.get('IR_DATASETS_HOME')
    if kept is None and not os.path.exists(os.path.expanduser('~/.ir_datasets')):
        # a package that ranx imports makes forty folders there
        os.environ['IR_DATASETS_HOME'] = scratch = tempfile.mkdtemp(prefix='finetuner-')
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    try:
        from ranx.statistical_tests import paired_student_t_test
    finally:
        if kept is None:
            os.environ.pop('IR_DATASETS_HOME', None)
    return paired_student_t_test


def p_value_text(p_value: float) -> str:
    """`'p < 0.001'`, `'p = 0.042'`."""
    if p_value < _LEAST_SHOWN:
        return f'p < {_LEAST_SHOWN}'
    return f'p = {p_value:.3f}'


def change_text(before: float, after: float, p_value: float) -> str:
    """`'0.535 -> 0.741 (p < 0.001)'`."""
    return f'{before:.3f} -> {after:.3f} ({p_value_text(p_value)})'
