"""Import torchvision, also beside a torch that its compiled operators were not built for.

torchvision from PyPI is compiled against the CUDA build of torch. Beside a CPU build its operator
library does not load, and `import torchvision` then stops at "operator torchvision::nms does not
exist", although models and transforms need none of those operators. Giving torch the schemas of
the two operators that are looked up at import time is enough for everything but the operators
themselves (`nms`, and the decoders of `torchvision.io`), which we never call.
"""

import functools
import importlib.util
import threading
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = ('nms', 'qnms')
_lock = threading.Lock()
_kept: list[torch.library.Library] = []  # a Library unregisters its schemas when collected


def _operators_load() -> bool:
    """Whether torchvision's compiled operators can be loaded into this torch."""
    spec = importlib.util.find_spec('torchvision')
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = Path(spec.submodule_search_locations[0])
    for library in (*folder.glob('_C*.so'), *folder.glob('_C*.pyd')):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
        return True
    return False


def import_torchvision() -> ModuleType:
    """Import torchvision, mending the import only where it would fail; from any thread.

    Returns:
        The `torchvision` module, with `torchvision.models` imported.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    # torch takes the schemas once, and the first requests of a server may well come together
    with _lock:
        return _import_once()


@functools.cache
def _import_once() -> ModuleType:
    if not _operators_load():
        library = torch.library.Library('torchvision', 'DEF')
        for name in _SCHEMAS:
            library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        _kept.append(library)
    import torchvision
    import torchvision.models

    return torchvision
