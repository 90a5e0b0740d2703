"""What a service calls its models."""

import shutil

import pytest
import torch

from finetuner.artifact import save_artifact
from finetuner.models.zoo import ALIASES
from finetuner.server.artifact_names import ArtifactNames
from tests.unit.tiny_artifacts import make_model, make_spec, pictures


@pytest.mark.parametrize('name', sorted(ALIASES))
def test_a_model_is_one_whichever_of_its_names_is_used(name):
    names = ArtifactNames('efficientnet-lite0')
    assert names.resolve(name) == names.resolve(ALIASES[name]) == ALIASES[name]


def test_what_lies_at_a_path_is_told_apart_without_the_path(tmp_path):
    first, other = tmp_path / 'first', tmp_path / 'other'
    save_artifact(first, make_model(), make_spec(), onnx_inputs=pictures())
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    save_artifact(other, model, make_spec(), onnx_inputs=pictures())
    moved = shutil.copytree(first, tmp_path / 'moved')
    zipped = shutil.make_archive(str(tmp_path / 'zipped'), 'zip', first)
    shown = []
    for path in (first, other, moved, zipped):
        names = ArtifactNames(str(path))
        key = names.resolve(str(path))
        names.load_engine(key, None, device='cpu', is_onnx=False)
        shown.append(names.shown(key))
    assert shown[0] == shown[2] == shown[3] != shown[1]
    assert all(name.startswith('local-') and str(tmp_path) not in name for name in shown)
    assert ArtifactNames('x').shown('efficientnet-lite0') == 'efficientnet-lite0'
