"""LoRA: adapters alone are trained, their artifact needs no PEFT and is what training ended with."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from finetuner.artifact import ModelSpec, load_artifact, save_artifact
from finetuner.config import RunConfig
from finetuner.excepts import ConfigError
from finetuner.inference import load_engine
from finetuner.inputs import build_reader
from finetuner.models.lora import attach_lora, check_lora, merge_lora
from finetuner.models.tailor import build_embedding_model
from finetuner.models.transformers_import import import_transformers
from finetuner.models.zoo import (
    BACKBONES,
    backbone_tokenizer,
    get_backbone,
    input_spec,
    parse_options,
)
from finetuner.runs.runner import execute_run, validate_run
from finetuner.training.optimization import build_model_optimizer
from tests.unit.test_runner import Observer
from tests.unit.test_text_training import TEXTS, labelled
from tests.unit.tiny_encoder import DIMENSION, write_tiny_encoder

LORA = {'rank': 4, 'alpha': 8.0}
# of each of two layers: query, key, value, output, and the two around the larger middle
NUM_ADAPTED = 2 * 6


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    return write_tiny_encoder(tmp_path_factory.mktemp('tiny') / 'encoder')


def build(encoder, output_dim=None, **lora):
    backbone, options = get_backbone(str(encoder)), {'lora': {**LORA, **lora}}
    torch.manual_seed(0)
    model = build_embedding_model(backbone, options, output_dim)
    attach_lora(model, backbone, options)
    return model


def teach(model, seed=1):
    """Let adapters say something, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'lora_B' in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def inputs_of(encoder):
    backbone = get_backbone(str(encoder))
    spec = input_spec(backbone, parse_options(backbone, None))
    reader = build_reader(spec, backbone_tokenizer(backbone))
    docs = labelled()
    return spec, reader.batch([reader.read(doc, i) for i, doc in enumerate(docs)])


def embed(model, inputs):
    with torch.inference_mode():
        return model({name: torch.from_numpy(a) for name, a in inputs.items()}).numpy()


def adapted(model):
    return [n for n, _ in model.named_parameters() if n.endswith('lora_A.default.weight')]


def test_only_adapters_and_heads_are_trained(encoder):
    model = build(encoder, output_dim=4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in trained if 'lora_' not in name}
    assert heads == {'projection_head.0.linear.weight'}
    assert len(trained) == 2 * NUM_ADAPTED + 1
    rows = {tuple(p.shape) for n, p in model.named_parameters() if 'lora_A' in n}
    assert rows == {(4, DIMENSION), (4, 32)}


def test_adapters_change_nothing_at_first(encoder):
    _, inputs = inputs_of(encoder)
    plain = build_embedding_model(get_backbone(str(encoder))).eval()
    model = build(encoder).eval()
    np.testing.assert_allclose(embed(model, inputs), embed(plain, inputs), atol=1e-6)
    assert np.abs(embed(teach(model), inputs) - embed(plain, inputs)).max() > 0.1


def test_what_an_adapter_adds_is_the_product_of_its_matrices(encoder):
    model = teach(build(encoder, target_modules=['query']))
    assert len(adapted(model)) == 2
    layer = model.backbone.transformer.encoder.layer[1].attention.self.query
    given = torch.randn(3, DIMENSION, generator=torch.Generator().manual_seed(3))
    a, b = layer.lora_A['default'].weight, layer.lora_B['default'].weight
    expected = layer.base_layer(given) + (given @ a.T @ b.T) * (8.0 / 4)
    torch.testing.assert_close(layer(given), expected)
    before = layer.base_layer.weight.detach().clone()
    merge_lora(model)
    merged = model.backbone.transformer.encoder.layer[1].attention.self.query
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged.weight, before + b @ a * (8.0 / 4))


def test_dropout_is_of_training_alone(encoder):
    _, inputs = inputs_of(encoder)
    model = teach(build(encoder, dropout=0.5))
    np.testing.assert_array_equal(embed(model, inputs), embed(model, inputs))
    for module in model.modules():  # but for those of the adapters
        if isinstance(module, torch.nn.Dropout) and module.p == 0.5:
            module.train()
    assert np.abs(embed(model, inputs) - embed(model, inputs)).max() > 1e-3


def test_the_artifact_gives_what_the_adapted_model_gave(encoder, tmp_path):
    from sentence_transformers import SentenceTransformer

    spec, inputs = inputs_of(encoder)
    model = teach(build(encoder, output_dim=4))
    expected = embed(model, inputs)
    described = ModelSpec('encoder', 4, spec, 4)
    save_artifact(tmp_path / 'a', model, described, onnx_inputs=inputs, onnx_required=True)
    assert not [n for n, _ in model.named_parameters() if 'lora' in n]
    again = load_artifact(tmp_path / 'a').build_model()
    np.testing.assert_allclose(embed(again, inputs), expected, atol=1e-5)
    peer = SentenceTransformer(str(tmp_path / 'a'), device='cpu')
    np.testing.assert_allclose(peer.encode(TEXTS), expected, atol=1e-5)
    graph = load_engine(tmp_path / 'a', is_onnx=True, device='cpu').embed(inputs)
    np.testing.assert_allclose(graph, expected, atol=1e-4)


def test_the_artifact_opens_without_peft(encoder, tmp_path):
    spec, inputs = inputs_of(encoder)
    model = teach(build(encoder))
    expected = embed(model, inputs)
    save_artifact(tmp_path / 'a', model, ModelSpec('encoder', DIMENSION, spec))
    assert 'lora' not in json.dumps(json.loads((tmp_path / 'a' / 'config.json').read_text()))
    np.savez(tmp_path / 'inputs.npz', **inputs)
    code = f"""
import sys
sys.modules['peft'] = None
import numpy as np
from finetuner.inference import load_engine
inputs = dict(np.load({str(tmp_path / 'inputs.npz')!r}))
engine = load_engine({str(tmp_path / 'a')!r}, is_onnx=False, device='cpu')
np.save({str(tmp_path / 'found.npy')!r}, engine.embed(inputs))
"""
    subprocess.run([sys.executable, '-c', code], check=True)
    np.testing.assert_allclose(np.load(tmp_path / 'found.npy'), expected, atol=1e-5)


@pytest.mark.parametrize(
    ('kind', 'sizes'),
    [
        ('distilbert', {'dim': 16, 'hidden_dim': 32, 'n_heads': 2, 'n_layers': 2}),
        ('mpnet', {'hidden_size': 16, 'intermediate_size': 32, 'num_attention_heads': 2}),
        ('t5', {'d_model': 16, 'd_ff': 32, 'd_kv': 8, 'num_heads': 2, 'num_layers': 2}),
    ],
)
def test_other_encoders_are_adapted_too(encoder, tmp_path, kind, sizes):
    folder = shutil.copytree(encoder, tmp_path / kind)
    config = import_transformers().AutoConfig.for_model(kind, vocab_size=100, **sizes)
    config.save_pretrained(folder)
    backbone, options = get_backbone(str(folder)), {'weights': 'none', 'lora': LORA}
    check_lora(backbone, options, False)
    model = build_embedding_model(backbone, options)
    attach_lora(model, backbone, options)
    linear = [m for m in model.modules() if type(m) is torch.nn.Linear]
    # each linear layer is one of an adapter: what it adapts, or one of its two matrices
    assert len(adapted(model)) * 3 == len(linear) > 10
    model = teach(model)
    inputs = {'input_ids': np.arange(3, 15).reshape(2, 6), 'attention_mask': np.ones((2, 6), int)}
    before = embed(model, inputs)
    merge_lora(model)
    assert not adapted(model)
    np.testing.assert_allclose(embed(model, inputs), before, atol=1e-5)


# runs


def config(encoder, **parameters):
    base = {'model': str(encoder), 'train_data': 'train', 'loss': 'TripletMarginLoss', 'epochs': 2}
    base |= {'learning_rate': 3e-3, 'scheduler': 'constant', 'batch_size': 12, 'num_workers': 0}
    base |= {'device': 'cpu', 'model_options': {'lora': LORA}}
    return RunConfig.from_parameters({**base, **parameters})


def execute(encoder, directory, **parameters):
    chosen, observer = config(encoder, **parameters), Observer()
    data = {'train': labelled(), 'eval': labelled()}
    named = {'train_data': data['train']}
    if chosen.eval_data:
        named['eval_data'] = data['eval']
    validate_run(chosen, named)
    execute_run(chosen, data.__getitem__, directory, observer)
    return observer


def weights(directory):
    return load_artifact(directory).build_model().state_dict()


def changed(encoder, directory):
    before = build_embedding_model(get_backbone(str(encoder))).state_dict()
    after = weights(directory)
    assert set(after) == set(before)
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_a_run_changes_what_is_adapted_and_says_how_much(encoder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger='finetuner'):
        observer = execute(encoder, tmp_path / 'a', epochs=12, to_onnx=True)
    moved = changed(encoder, tmp_path / 'a')
    assert len(moved) == NUM_ADAPTED
    assert all(name.endswith('weight') and 'LayerNorm' not in name for name in moved)
    losses = [values['train_loss'] for _, values in observer.epochs]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    # the rank times both sides of each adapted matrix
    sides = 4 * 2 * DIMENSION + 2 * (DIMENSION + 32)
    assert f'Training {4 * 2 * sides:,} of ' in caplog.text
    manifest = json.loads((tmp_path / 'a' / 'artifact.json').read_text())
    assert manifest['config']['model_options'] == {'lora': LORA}


def test_the_best_epoch_is_kept_with_its_adapters(encoder, tmp_path):
    observer = execute(encoder, tmp_path / 'last', epochs=3, eval_data='eval')
    losses = [values['val_loss'] for _, values in observer.epochs]
    # whichever way the loss goes, the best epoch is not the last
    mode, best = ('max', max) if losses[-1] == min(losses) else ('min', min)
    options = {'monitor': 'val_loss', 'mode': mode}
    kept = [{'name': 'BestModelCheckpoint', 'options': options}]
    execute(encoder, tmp_path / 'best', epochs=3, callbacks=kept, eval_data='eval')
    num_epochs = losses.index(best(losses)) + 1
    execute(encoder, tmp_path / 'short', epochs=num_epochs, eval_data='eval')
    found, short, last = (weights(tmp_path / name) for name in ('best', 'short', 'last'))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, short[name])
    assert any(not torch.allclose(tensor, last[name]) for name, tensor in found.items())


def test_training_goes_on_from_an_artifact_with_new_adapters(encoder, tmp_path):
    execute(encoder, tmp_path / 'first')
    first = weights(tmp_path / 'first')
    execute(
        encoder, tmp_path / 'second', model_artifact=str(tmp_path / 'first'), learning_rate=1e-9
    )
    for name, tensor in weights(tmp_path / 'second').items():
        torch.testing.assert_close(tensor, first[name], atol=1e-6, rtol=0)


def test_rates_by_layer_are_those_of_the_layers_adapted(encoder):
    model = build(encoder, output_dim=4)
    optimizer = build_model_optimizer('AdamW', model, 1e-2, {'layer_wise_lr_decay': 0.5})
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {group['lr']: {names[p] for p in group['params']} for group in optimizer.param_groups}
    assert sorted(rates) == [5e-3, 1e-2]
    assert all('lora_' in name and '.layer.0.' in name for name in rates[5e-3])
    assert 'projection_head.0.linear.weight' in rates[1e-2]
    assert {n.split('.layer.')[1][0] for n in rates[1e-2] if 'lora_' in n} == {'1'}


@pytest.mark.parametrize(
    ('lora', 'message'),
    [
        ({'rank': 0}, r'lora\.rank: .*greater than or equal to 1'),
        ({'rank': 2.5}, r'lora\.rank: 2\.5 is not a whole number'),
        ({'alpha': 0}, r'lora\.alpha: '),
        ({'dropout': 1.0}, r'lora\.dropout: '),
        ({'r': 4}, "unknown option of lora of model encoder 'r'"),
        ({'target_modules': 'query'}, 'takes a list of names'),
        ({'target_modules': []}, 'takes a list of names'),
        ({'target_modules': ['quary']}, "'quary': did you mean 'query'.*dense, key, query, value"),
        ({'target_modules': ['LayerNorm']}, 'lora: Target module LayerNorm.* is not supported'),
    ],
)
def test_wrong_options_are_refused_at_the_door(encoder, lora, message):
    with pytest.raises(ConfigError, match=message):
        validate_run(config(encoder, model_options={'lora': lora}), {'train_data': labelled()})


def test_freezing_contradicts(encoder):
    with pytest.raises(ConfigError, match=r'freeze=True .* lora .*leave one of them out'):
        validate_run(config(encoder, freeze=True), {'train_data': labelled()})


def test_numbers_may_come_through_protobuf(encoder):
    lora = {'rank': 4.0, 'alpha': 8, 'dropout': 0.0}
    options = parse_options(get_backbone(str(encoder)), {'lora': lora})
    assert (options.lora.rank, options.lora.alpha) == (4, 8.0)


def test_pictures_have_none():
    with pytest.raises(ConfigError, match="unknown option of model efficientnet-lite0 'lora'"):
        parse_options(BACKBONES['efficientnet-lite0'], {'lora': {}})


def test_a_missing_package_is_named(encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(ConfigError, match=r'needs the package peft: pip install finetuner\[lora\]'):
        validate_run(config(encoder), {'train_data': labelled()})
