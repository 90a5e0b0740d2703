"""Make `import torchvision` work beside a torch without CUDA, by the library's own module for it."""

import importlib.util
from pathlib import Path


def mend_torchvision() -> None:
    """Import torchvision, mended where the import would fail, so that others can import it, too."""
    # by its path: this environment has neither finetuner nor what it needs
    path = Path(__file__).parents[2] / 'finetuner' / 'models' / 'torchvision_import.py'
    spec = importlib.util.spec_from_file_location('torchvision_import', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.import_torchvision()
