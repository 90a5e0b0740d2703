"""The runner: refuses at the door what cannot work, and makes an artifact of what can."""

import copy
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

from finetuner.artifact import load_artifact
from finetuner.config import RunConfig
from finetuner.data.contents import read_label
from finetuner.evaluation import METRICS, evaluate_embeddings
from finetuner.excepts import ArtifactError, ConfigError, DataError, PictureError
from finetuner.inference import load_engine
from finetuner.models.zoo import BACKBONES
from finetuner.runs.run_files import checkpoint_directory, epochs_directory
from finetuner.runs.runner import data_references, execute_run, validate_run
from finetuner.training.epoch_directories import kept_epochs
from tests.conftest import make_picture_docs

OPTIONS = {'weights': 'none', 'input_size': 32}
BASE = {
    'model': 'mobilenet_v3_small',
    'model_options': OPTIONS,
    'train_data': 'train',
    'loss': 'TripletMarginLoss',
    'epochs': 2,
    'batch_size': 12,
    'learning_rate': 1e-3,
    'num_workers': 0,
    'device': 'cpu',
}
EVALUATION = {'name': 'EvaluationCallback', 'options': {'query_data': 'query', 'limit': 3}}


def config(**parameters):
    return RunConfig.from_parameters({**BASE, **parameters})


class Observer:
    """Keeps what it is told."""

    def __init__(self):
        self.progresses, self.steps, self.epochs, self.evaluations = [], [], [], []
        self.results = {}

    def progress(self, values):
        self.progresses.append(values)

    def step_metrics(self, step, epoch, values):
        self.steps.append((step, epoch, values))

    def epoch_metrics(self, epoch, values):
        self.epochs.append((epoch, values))

    def evaluation(self, stage, metrics):
        self.evaluations.append((stage, dict(metrics)))

    def examples(self, stage, results):
        self.results[stage] = results


def execute(directory, data=None, **parameters):
    stored = {'train': make_picture_docs(), 'query': make_picture_docs(seed=1), **(data or {})}
    observer = Observer()
    execute_run(config(**parameters), lambda name: stored[name], directory, observer)
    return observer


def weights_of(directory):
    return load_artifact(directory).build_model().state_dict()


def kept(tmp_path, name, last_k=2, **parameters):
    """Run with TrainingCheckpoint; the observer, and what is kept by epoch."""
    observer = GoingObserver()
    stored = {'train': make_picture_docs(), 'query': make_picture_docs(seed=1)}
    callback = {'name': 'TrainingCheckpoint', 'options': {'last_k_epochs': last_k}}
    given = config(
        callbacks=[EVALUATION, callback], epochs=3, checkpoint_seconds=1e-6, **parameters
    )
    files = tmp_path / name
    execute_run(given, stored.__getitem__, tmp_path / f'{name}-artifact', observer, files)
    return observer, kept_epochs(epochs_directory(files))


class GoingObserver(Observer):
    """Hears of checkpoints, too."""

    def __init__(self):
        super().__init__()
        self.places, self.num_saves = [], 0

    def begins(self, step, epoch):
        self.places.append((step, epoch))

    def write_all(self):
        self.num_saves += 1

    def is_paused(self):
        return False


def test_models_of_the_last_epochs_are_whole_artifacts(tmp_path):
    observer, found = kept(tmp_path, 'run')
    assert list(found) == [2, 3]
    assert (observer.places, observer.num_saves) == ([(0, 0)], 9)
    # training itself is not disturbed: the last one is the model that the run ends with
    execute(tmp_path / 'alone', callbacks=[EVALUATION], epochs=3)
    last = weights_of(tmp_path / 'alone')
    for name, tensor in weights_of(found[3]).items():
        assert torch.equal(tensor, last[name]), name
    assert any(not torch.equal(t, last[name]) for name, t in weights_of(found[2]).items())
    docs = DocumentArray(make_picture_docs(seed=1), copy=True)
    assert load_engine(found[2]).encode_documents(docs) == []
    assert docs.embeddings.shape == (24, 576)
    artifact = load_artifact(found[2])
    assert list(artifact.metrics) == ['before']
    assert artifact.onnx_path is None
    # and training goes on from one
    execute(tmp_path / 'next', model_artifact=str(found[2]), epochs=1, model_options={})
    assert load_artifact(tmp_path / 'next').manifest['parent'] == 'epoch-2'


def test_an_epoch_kept_before_a_kill_is_written_again(tmp_path):
    _, found = kept(tmp_path, 'run', last_k=1)
    assert list(found) == [3]
    before = weights_of(found[3])
    (found[3].parent / '.epoch-4').mkdir()
    found[3].rename(found[3].with_name('epoch-7'))
    # the checkpoint is that of the end: nothing is trained again
    files = tmp_path / 'run'
    given = config(callbacks=[EVALUATION, {'name': 'TrainingCheckpoint', 'options': {}}], epochs=3)
    stored = {'train': make_picture_docs(), 'query': make_picture_docs(seed=1)}
    observer = GoingObserver()
    execute_run(given, stored.__getitem__, tmp_path / 'again', observer, files)
    assert observer.places == [(6, 3)]
    assert observer.steps == []
    assert [stage for stage, _ in observer.evaluations] == ['before', 'after', 'p_value']
    for name, tensor in weights_of(tmp_path / 'again').items():
        assert torch.equal(tensor, before[name]), name
    # another attempt from the start clears what the first one kept
    shutil.rmtree(checkpoint_directory(files))
    execute_run(given, stored.__getitem__, tmp_path / 'anew', GoingObserver(), files)
    assert list(kept_epochs(epochs_directory(files))) == [3]
    assert sorted(path.name for path in epochs_directory(files).iterdir()) == ['epoch-3']


def test_models_of_epochs_need_a_run(tmp_path):
    with pytest.raises(ConfigError, match="TrainingCheckpoint keeps models in a run's directory"):
        execute(tmp_path, callbacks=[{'name': 'TrainingCheckpoint'}])


def validate(docs=None, data=None, **parameters):
    validate_run(
        config(**parameters),
        {'train_data': make_picture_docs() if docs is None else docs, **(data or {})},
    )


@pytest.mark.parametrize(
    ('parameters', 'message'),
    [
        ({'model': 'resnet-18'}, "unknown model 'resnet-18': did you mean 'resnet18'"),
        ({'model_options': {'weight': 'none'}}, "'weight': did you mean 'weights'"),
        ({'model_options': {'input_size': 20}}, 'input_size'),
        ({'loss': 'TripletMarginLos'}, "unknown loss.*did you mean 'TripletMarginLoss'"),
        ({'loss_options': {'margn': 1}}, "did you mean 'margin'"),
        ({'loss_options': {'distance': 'Cosine'}}, "unknown distance.*'CosineSimilarity'"),
        ({'miner': 'BatchHard'}, "unknown miner.*'BatchHardMiner'"),
        ({'miner_options': {'margin': 1}}, 'no miner'),
        ({'optimizer_options': {'momentum': 1}}, "unknown option of optimizer Adam 'momentum'"),
        ({'optimizer_options': {'betas': 3}}, 'Adam does not accept'),
        ({'loss_optimizer': 'SGD'}, 'TripletMarginLoss has no parameters to optimize'),
        ({'loss': 'ArcFaceLoss', 'optimizer': 'LBFGS'}, 'name another loss_optimizer'),
        ({'optimizer': 'Muon'}, 'Muon does not accept'),
        ({'model_options': {'weights': 'absent.pth'}}, "no file 'absent.pth'"),
        (
            {'loss': 'ArcFaceLoss', 'val_split': 0.4},
            'learns weights for the classes of the training data',
        ),
        (
            {'loss_options': {'reducer': {'name': 'ClassWeightedReducer', 'weights': [1, 2]}}},
            'TripletMarginLoss does not run with these options',
        ),
        (
            {'model': 'vit_b_16', 'model_options': {'weights': 'none', 'train_input_size': 96}},
            'train_input_size must be input_size',
        ),
        ({'scheduler_options': {'power': 2}}, 'no scheduler'),
        ({'scheduler': 'linear', 'scheduler_options': {'pover': 2}}, "did you mean 'power'"),
        ({'callbacks': [{'name': 'BestModelCheckPoint'}]}, "did you mean 'BestModelCheckpoint'"),
        ({'callbacks': [{'name': 'BestModelCheckpoint'}]}, "monitors 'val_loss', which nothing"),
        (
            {'callbacks': [{'name': 'EarlyStopping', 'options': {'monitor': 'recal'}}]},
            "monitors 'recal', which nothing measures",
        ),
        (
            {'callbacks': [{'name': 'EarlyStopping', 'options': {'patients': 1}}]},
            "did you mean 'patience'",
        ),
    ],
)
def test_wrong_configs_are_refused(parameters, message):
    with pytest.raises(ConfigError, match=message):
        validate(**parameters)


def spoiled(position, **changes):
    docs = make_picture_docs()
    for name, value in changes.items():
        setattr(docs[position], name, value)
    return docs


@pytest.mark.parametrize(
    ('docs', 'message'),
    [
        (DocumentArray(), 'there are no Documents'),
        (spoiled(5, tags={}), 'Document 5: label is missing'),
        (spoiled(5, tags={'finetuner_label': 1.5}), 'Document 5.*1.5'),
        (spoiled(5, blob=b''), 'Document 5.*empty'),
        (make_picture_docs(1, 24), 'all 24 Documents have the label 0'),
        (make_picture_docs(24, 1), 'each of the 24 labels occurs once'),
        (make_picture_docs(2, 4), 'needs 3 classes in a batch, and the data has 2'),
        (make_picture_docs(4, 2), 'needs 12 Documents in a batch, and the data has 8'),
    ],
    ids=['none', 'no label', 'label', 'empty', 'one class', 'singles', 'classes', 'few'],
)
def test_wrong_data_is_refused(docs, message):
    with pytest.raises(DataError, match=message):
        validate(docs)


def test_an_unreadable_picture_names_its_document_and_the_data():
    with pytest.raises(PictureError, match=r'^train_data: Document 17: '):
        validate(spoiled(17, blob=b'no picture'))
    with pytest.raises(PictureError, match=r'^eval_data: Document 3: '):
        validate(data={'eval_data': spoiled(3, blob=b'no picture')}, eval_data='x')
    with pytest.raises(PictureError, match=r'^callbacks.0.query_data: Document 2: '):
        validate(
            data={'callbacks.0.query_data': spoiled(2, blob=b'no picture')}, callbacks=[EVALUATION]
        )


def test_text_is_no_picture():
    docs = DocumentArray(
        Document(text=f'words {i}', tags={'finetuner_label': i % 6}) for i in range(24)
    )
    with pytest.raises(DataError, match=r'Document \d+ holds text'):
        validate(docs)


def test_queries_without_an_answer_are_refused():
    callback = copy.deepcopy(EVALUATION)
    callback['options']['index_data'] = 'index'
    queries, index = make_picture_docs(seed=1), make_picture_docs(5, seed=2)
    with pytest.raises(DataError, match=r'query_data: Documents 20, 21, 22, 23 .*index_data'):
        validate(
            data={'callbacks.0.query_data': queries, 'callbacks.0.index_data': index},
            callbacks=[callback],
        )


def test_validation_data_is_checked():
    with pytest.raises(DataError, match='eval_data: all 4 Documents have the label'):
        validate(data={'eval_data': make_picture_docs(1, 4)}, eval_data='x')
    with pytest.raises(DataError, match=r'val_split=0.9 of 6 classes leaves'):
        validate(val_split=0.9)


def test_damaged_artifacts_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match='no artifact at'):
        validate(model_artifact=str(tmp_path / 'absent'), model_options={})
    with pytest.raises(ArtifactError, match='is no artifact'):
        validate(model_artifact=str(tmp_path), model_options={})


def test_what_is_right_passes_and_is_left_as_it_is():
    docs = make_picture_docs()
    before = [doc.to_dict() for doc in docs]
    validate(docs)
    validate(docs, batch_size=None)
    validate(docs, val_split=0.4, batch_size=8, callbacks=[{'name': 'EarlyStopping'}])
    validate(docs, sampler='random', batch_size=5)
    assert [doc.to_dict() for doc in docs] == before


def test_references_of_a_config():
    callback = {
        'name': 'EvaluationCallback',
        'options': {'query_data': 'q', 'index_data': 'i', 'limit': 3},
    }
    found = data_references(
        config(eval_data='e', callbacks=[{'name': 'EarlyStopping'}, callback, EVALUATION])
    )
    assert found == {
        'train_data': 'train',
        'eval_data': 'e',
        'callbacks.1.query_data': 'q',
        'callbacks.1.index_data': 'i',
        'callbacks.2.query_data': 'query',
    }


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run from its config to its artifact, and what its observer heard."""
    directory = tmp_path_factory.mktemp('run') / 'artifact'
    callback = copy.deepcopy(EVALUATION)
    callback['options'].update(gather_examples=True, num_example_queries=3)
    return directory, execute(
        directory, callbacks=[callback], output_dim=8, scheduler='linear', to_onnx=True
    )


def test_a_run_ends_in_an_artifact(trained):
    directory, _ = trained
    found = load_artifact(directory)
    assert found.onnx_path is not None
    assert (found.spec.backbone, found.spec.dimension) == ('mobilenet_v3_small', 8)
    assert found.spec.inputs.input_size == 32
    manifest = json.loads((directory / 'artifact.json').read_text())
    assert manifest['num_documents'] == 24
    assert RunConfig.from_parameters(manifest['config']).loss == 'TripletMarginLoss'
    assert manifest['parent'] is None


def test_the_observer_hears_everything(trained):
    _, observer = trained
    assert [(p['epoch'], p['batch']) for p in observer.progresses] == [
        (1, 1), (1, 2), (2, 1), (2, 2),
    ]  # fmt: skip
    assert [step for step, _, _ in observer.steps] == [1, 2, 3, 4]
    rates = [values['learning_rate'] for _, _, values in observer.steps]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [epoch for epoch, _ in observer.epochs] == [0, 1]
    assert {'train_loss', *METRICS} <= set(observer.epochs[0][1])
    assert [stage for stage, _ in observer.evaluations] == ['before', 'after', 'p_value']
    assert set(observer.evaluations[0][1]) == {f'mobilenet_v3_small_{name}' for name in METRICS}
    assert set(observer.results) == {'before', 'after'}
    assert len(observer.results['after']) == 3


def test_after_is_what_the_artifact_gives(trained):
    directory, observer = trained
    queries = make_picture_docs(seed=1)
    load_engine(directory, is_onnx=False, device='cpu').encode_documents(queries)
    labels = [read_label(doc) for doc in queries]
    expected = evaluate_embeddings(
        queries.embeddings, labels, queries.embeddings, labels, limit=3,
        query_ids=list(queries[:, 'id']), index_ids=list(queries[:, 'id']),
    )  # fmt: skip
    for name, value in expected.items():
        assert observer.evaluations[1][1][f'mobilenet_v3_small_{name}'] == pytest.approx(
            value, abs=0.02
        )
    metrics = load_artifact(directory).metrics
    assert metrics['before'] == observer.evaluations[0][1]
    assert metrics['after'] == observer.evaluations[1][1]


def test_the_same_seed_gives_the_same_artifact(trained, tmp_path):
    directory, _ = trained
    again, other = tmp_path / 'again', tmp_path / 'other'
    execute(again, output_dim=8, scheduler='linear')
    execute(other, output_dim=8, scheduler='linear', seed=1)
    first = weights_of(directory)
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights_of(again).items())
    assert not all(torch.equal(tensor, first[name]) for name, tensor in weights_of(other).items())


def test_training_goes_on_from_an_artifact(trained, tmp_path):
    directory, _ = trained
    child = tmp_path / 'child'
    observer = execute(
        child,
        model_artifact=str(directory),
        model_options={},
        callbacks=[EVALUATION],
        learning_rate=1e-12,
        freeze_batch_norm=True,
        epochs=1,
    )
    found = load_artifact(child)
    assert found.spec == load_artifact(directory).spec
    assert found.manifest['parent'] == 'artifact'
    # it begins where its parent ended, and at such a rate stays there
    after = load_artifact(directory).metrics['after']
    assert observer.evaluations[0] == ('before', pytest.approx(after))
    continued = weights_of(child)
    for name, tensor in weights_of(directory).items():
        torch.testing.assert_close(continued[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('parameters', [{'model_options': OPTIONS}, {'output_dim': 4}])
def test_an_artifact_keeps_its_shape(trained, parameters):
    with pytest.raises(ConfigError, match='those of the artifact that training goes on from'):
        validate(model_artifact=str(trained[0]), **{'model_options': {}, **parameters})


def test_an_artifact_keeps_its_backbone(trained):
    with pytest.raises(ConfigError, match=f"pass model='{BASE['model']}'"):
        validate(model='resnet18', model_options={}, model_artifact=str(trained[0]))


def test_two_evaluations_need_captions():
    docs = make_picture_docs(seed=1)
    options = {'query_data': 'query', 'limit': 3}
    callbacks = [{'name': 'EvaluationCallback', 'options': dict(options)} for _ in range(2)]
    data = {f'callbacks.{position}.query_data': docs for position in range(2)}
    with pytest.raises(ConfigError, match='overwrite the metrics of each other'):
        validate(data=data, callbacks=callbacks)
    callbacks[1]['options']['caption'] = 'other'
    validate(data=data, callbacks=callbacks)


def test_freezing_without_a_projection_trains_the_last_layer(tmp_path):
    execute(tmp_path / 'a', freeze=True, epochs=1, freeze_batch_norm=True)
    execute(tmp_path / 'b', freeze=True, epochs=2, freeze_batch_norm=True)
    one, two = weights_of(tmp_path / 'a'), weights_of(tmp_path / 'b')
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    # the last convolution, and the scale and shift of the normalisation after it
    assert changed == {
        f'backbone.features.12.{name}' for name in ('0.weight', '1.weight', '1.bias')
    }


def test_freezing_trains_the_projection_only(tmp_path):
    execute(tmp_path / 'a', freeze=True, output_dim=8, epochs=1, freeze_batch_norm=True)
    execute(tmp_path / 'b', freeze=True, output_dim=8, epochs=2, freeze_batch_norm=True)
    one, two = weights_of(tmp_path / 'a'), weights_of(tmp_path / 'b')
    assert {name for name in one if not torch.equal(one[name], two[name])} == {
        'projection_head.weight'
    }


def test_validation_classes_are_not_trained_on(tmp_path):
    observer = execute(tmp_path / 'a', val_split=0.4)
    assert load_artifact(tmp_path / 'a').manifest['num_documents'] == 16
    assert all(values['val_loss'] >= 0 for _, values in observer.epochs)


def test_small_validation_data_is_enough(tmp_path):
    observer = execute(
        tmp_path / 'a', data={'eval': make_picture_docs(2, 4, seed=5)}, eval_data='eval', epochs=1
    )
    assert np.isfinite(observer.epochs[0][1]['val_loss'])


@pytest.mark.parametrize('pretrained', [True, False])
def test_batch_norm_is_frozen_with_pretrained_weights(tmp_path, pretrained):
    from finetuner.models.tailor import build_embedding_model

    options = {'input_size': 32} if pretrained else OPTIONS
    name = 'efficientnet-lite0' if pretrained else 'mobilenet_v3_small'
    execute(tmp_path / 'a', model=name, model_options=options, epochs=1)
    before = build_embedding_model(BACKBONES[name], options).state_dict()
    after = weights_of(tmp_path / 'a')
    means = [key for key in before if key.endswith('running_mean')]
    assert means
    assert all(torch.equal(before[key], after[key]) for key in means) == pretrained


def test_smaller_pictures_in_training(tmp_path):
    execute(tmp_path / 'a', model_options={**OPTIONS, 'input_size': 64, 'train_input_size': 32})
    assert load_artifact(tmp_path / 'a').spec.inputs.input_size == 64


def test_a_picture_that_breaks_later_fails_the_run_and_leaves_no_artifact(tmp_path):
    with pytest.raises(DataError, match='Document 9'):
        execute(tmp_path / 'a', data={'train': spoiled(9, blob=b'gone')}, sampler='random')
    with pytest.raises(ArtifactError):
        load_artifact(tmp_path / 'a')


def test_the_log_tells_the_plan(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger='finetuner'):
        execute(tmp_path / 'a', epochs=1)
    assert 'Model mobilenet_v3_small of pictures at 32 pixels (32 in training)' in caplog.text
    assert (
        'Training on 24 Documents (class): TripletMarginLoss, Adam, learning rate 0.001'
        in caplog.text
    )
    assert 'Epoch 1/1 done' in caplog.text
    assert 'Writing the artifact' in caplog.text
