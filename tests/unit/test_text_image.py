"""Models of two towers: what they give, what they learn, how they are kept, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

import finetuner
from finetuner.artifact import load_artifact
from finetuner.artifact_files import zip_artifact
from finetuner.config import RunConfig
from finetuner.evaluation import evaluate_embeddings
from finetuner.excepts import ArtifactError, ConfigError, DataError
from finetuner.inference import build_engine, load_engine
from finetuner.models.alignment import Alignment
from finetuner.models.backbones import TEXT_TOWER, TOWERS, VISION_TOWER
from finetuner.models.transformers_import import import_transformers
from finetuner.models.zoo import get_backbone
from finetuner.runs.plan import make_plan
from finetuner.runs.runner import data_references, execute_run, validate_run
from finetuner.runs.training_parts import build_training
from finetuner.training.objectives import build_objective
from finetuner.training.pair_losses import CLIPLoss
from tests.conftest import png
from tests.unit.test_runner import Observer
from tests.unit.tiny_encoder import CLIP_SIZE, DIMENSION, write_tiny_clip, write_tiny_encoder

COLOURS = {'red': (220, 30, 30), 'green': (30, 200, 30), 'blue': (30, 30, 220)}
TEXTS = [f'{size} {colour} shoe' for colour in COLOURS for size in ('small', 'large')]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A text encoder and a CLIP."""
    place = tmp_path_factory.mktemp('tiny')
    return write_tiny_encoder(place / 'encoder'), write_tiny_clip(place / 'clip')


def picture(text, seed=0):
    """A square of the colour that a text names, small or large."""
    size, colour, _ = text.split()
    pixels = np.random.default_rng(seed).integers(0, 40, (40, 40, 3))
    half = 6 if size == 'small' else 18
    pixels[20 - half : 20 + half, 20 - half : 20 + half] += np.array(COLOURS[colour])
    return png(np.clip(pixels, 0, 255).astype(np.uint8))


def pairs(per_text=4):
    return DocumentArray(
        Document(
            chunks=[
                Document(text=text, modality='text'),
                Document(blob=picture(text, seed), modality='image'),
            ]
        )
        for seed in range(per_text)
        for text in TEXTS
    )


def config(model, **parameters):
    base = {'model': model, 'train_data': 'train', 'epochs': 2, 'num_workers': 0, 'device': 'cpu'}
    return RunConfig.from_parameters({**base, **parameters})


def joined(folders, **parameters):
    options = {'input_size': 32, **parameters.pop('model_options', {})}
    return config(f'{folders[0]}+efficientnet-lite0', model_options=options, **parameters)


def data_of(chosen, docs, more=None):
    known = {'train': docs, **(more or {})}
    return {key: known[name] for key, name in data_references(chosen).items()}


def execute(chosen, directory, docs=None, more=None):
    known = {'train': pairs() if docs is None else docs, **(more or {})}
    validate_run(chosen, data_of(chosen, known['train'], more))
    observer = Observer()
    execute_run(chosen, known.__getitem__, directory, observer)
    return observer


def test_towers_of_a_clip_give_what_transformers_gives(folders):
    clip = str(folders[1])
    whole = import_transformers().CLIPModel.from_pretrained(clip).eval()
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(clip)
    texts = ['red shoe', 'a small blue hat of the cat']
    tokens = tokenizer(texts, padding=True, return_tensors='pt')
    engine = build_engine(clip, select_model=TEXT_TOWER)
    with torch.no_grad():
        pooled = whole.text_model(**tokens).pooler_output
        expected = torch.nn.functional.normalize(whole.text_projection(pooled)).numpy()
    np.testing.assert_allclose(finetuner.encode(engine, texts), expected, atol=1e-6)
    pixels = np.random.default_rng(0).integers(0, 256, (3, CLIP_SIZE, CLIP_SIZE, 3), dtype=np.uint8)
    spec = get_backbone(clip).picture
    scaled = (pixels / 255 - np.array(spec.mean)) / np.array(spec.std)
    values = torch.from_numpy(scaled).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        pooled = whole.vision_model(pixel_values=values).pooler_output
        expected = whole.visual_projection(pooled).numpy()
    for is_onnx in (False, True):
        vision = build_engine(clip, select_model=VISION_TOWER, is_onnx=is_onnx)
        np.testing.assert_allclose(vision.embed(pixels), expected, atol=1e-4)


def test_clip_loss_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    texts, images = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    numbers = torch.tensor([0, 1, 2, 1, 3])
    loss = CLIPLoss(temperature=0.2).double()
    unit = [t / t.norm(dim=1, keepdim=True) for t in (texts, images)]
    total = 0.0
    for one, other in (unit, unit[::-1]):
        for i in range(5):
            logits = [float(one[i] @ other[j]) / 0.2 for j in range(5)]
            log_sum = math.log(sum(math.exp(value) for value in logits))
            right = [j for j in range(5) if numbers[j] == numbers[i]]
            total -= sum(logits[j] - log_sum for j in right) / len(right) / 5
    assert float(loss(texts, images, numbers).detach()) == pytest.approx(total / 2, rel=1e-6)


def test_clip_loss_learns_its_temperature_and_stops_at_the_largest_scale():
    loss = CLIPLoss(temperature=0.07)
    both = torch.eye(4)
    loss(both, both, torch.arange(4)).backward()
    assert loss.log_scale.grad < 0, 'right pairs ask for a sharper temperature'
    sharp = CLIPLoss(temperature=1e-6, max_scale=50)
    swapped = both.flip(0)
    assert float(sharp(both, swapped, torch.arange(4)).detach()) == pytest.approx(50, rel=1e-3)
    # what comes to the largest scale, or begins at it, can go back
    unrelated = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    for loss in (CLIPLoss(0.01, 100), CLIPLoss(1e-6, 100)):
        loss(*unrelated, torch.arange(6)).backward()
        assert loss.log_scale.grad > 0
        with torch.inference_mode():
            assert math.isfinite(loss(*unrelated, torch.arange(6)))
    for wrong in ({'temperature': 0}, {'temperature': -1}, {'max_scale': 0}):
        with pytest.raises(ValueError, match='above 0'):
            CLIPLoss(**wrong)


def test_the_temperature_has_an_optimizer_in_a_run(folders):
    chosen = joined(folders, loss_optimizer='SGD', loss_optimizer_options={'lr': 0.5})
    plan = make_plan(chosen, data_of(chosen, pairs()))
    built = build_training(plan, torch.nn.Linear(2, 2))
    (group,) = built.optimizers[1].param_groups
    assert [id(p) for p in group['params']] == [id(built.objective.loss.log_scale)]
    assert (type(built.optimizers[1]).__name__, group['lr']) == ('SGD', 0.5)


def test_the_objective_takes_texts_and_pictures_by_turns():
    class Seen(torch.nn.Module):
        def forward(self, texts, pictures, numbers):
            self.seen = texts, pictures, numbers
            return texts.sum()

    loss = Seen()
    labels = torch.tensor([[0, 0], [0, 1], [5, 0], [5, 1]])
    build_objective('text_image_pair', loss)(torch.arange(4.0)[:, None], labels)
    assert [part.flatten().tolist() for part in loss.seen] == [[0, 2], [1, 3], [0, 5]]


def test_alignment_is_a_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(40, 6, generator=generator)
    targets = sources @ torch.randn(6, 3, generator=generator) + 5
    head = Alignment(6, 3)
    head.fit(sources, targets)
    centred = (sources - sources.mean(0)).double()
    ridge = float((centred**2).sum()) / 6
    # the same as least squares with rows that pull the weights to 0
    rows = torch.cat([centred, math.sqrt(ridge) * torch.eye(6, dtype=torch.float64)])
    aims = torch.cat([(targets - targets.mean(0)).double(), torch.zeros(6, 3).double()])
    expected = torch.linalg.lstsq(rows, aims).solution
    torch.testing.assert_close(head.linear.weight.T, expected.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head(sources).mean(0), targets.mean(0), atol=1e-4, rtol=1e-4)


def ranks(engine):
    """Of each text among pictures that were not trained on: where its picture comes."""
    queries = DocumentArray(Document(text=text) for text in TEXTS)
    index = DocumentArray(Document(blob=picture(text, seed=99)) for text in TEXTS)
    for docs in (queries, index):
        finetuner.encode(engine, docs)
    similarity = queries.embeddings @ index.embeddings.T
    similarity /= np.linalg.norm(index.embeddings, axis=1)
    return (similarity > np.diag(similarity)[:, None]).sum(axis=1) + 1


def test_a_joined_model_learns_and_its_artifact_opens_everywhere(folders, tmp_path):
    from sentence_transformers import SentenceTransformer

    directory = tmp_path / 'artifact'
    chosen = joined(folders, epochs=6, learning_rate=3e-3, batch_size=24)
    observer = execute(chosen, directory)
    losses = [values['train_loss'] for _, values in observer.epochs]
    assert losses[-1] < losses[0]
    engine = load_engine(directory)
    assert engine.is_onnx
    assert engine.dimension == DIMENSION
    # by chance 3.5
    assert ranks(engine).mean() < 2
    artifact = load_artifact(directory)
    assert artifact.manifest['config']['loss'] == 'CLIPLoss'
    assert {path.parent.name for path in directory.rglob('artifact.json')} == {
        *TOWERS,
        directory.name,
    }
    pair = (Document(text='words'), Document(text='a caption', modality='image'))
    assert [engine.engine_for(doc) for doc in pair] == [engine.towers[name] for name in TOWERS]
    sizes = [(directory / name / 'model.onnx').stat().st_size for name in TOWERS]
    assert engine.num_bytes == sum(sizes)
    engine.warm_up()
    text, vision = (load_engine(directory, select_model=name) for name in TOWERS)
    vectors = finetuner.encode(text, TEXTS)
    again = SentenceTransformer(str(directory / TEXT_TOWER)).encode(TEXTS)
    np.testing.assert_allclose(vectors, again, atol=1e-4)
    torch_text, torch_vision = (
        load_engine(directory, select_model=name, is_onnx=False) for name in TOWERS
    )
    np.testing.assert_allclose(vectors, finetuner.encode(torch_text, TEXTS), atol=1e-4)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    found, expected = vision.embed(pixels), torch_vision.embed(pixels)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    zipped = zip_artifact(directory, tmp_path / 'model.zip')
    np.testing.assert_array_equal(ranks(load_engine(zipped)), ranks(engine))


def test_a_clip_is_trained_kept_and_gone_on_from(folders, tmp_path):
    first, second = tmp_path / 'first', tmp_path / 'second'
    execute(config(str(folders[1]), learning_rate=1e-2, batch_size=24), first)
    before, after = build_engine(str(folders[1])), load_engine(first, is_onnx=False)
    docs = [DocumentArray([Document(text=TEXTS[0]), pairs()[0].chunks[1]]) for _ in range(2)]
    for engine, chosen in zip((before, after), docs, strict=True):
        finetuner.encode(engine, chosen)
    for place in range(2):
        assert not np.allclose(docs[0][place].embedding, docs[1][place].embedding, atol=1e-3)
    chosen = config('clip', model_artifact=str(first), epochs=1, learning_rate=1e-9)
    execute(chosen, second)
    again = docs[0]
    finetuner.encode(load_engine(second, is_onnx=False), again)
    np.testing.assert_allclose(again.embeddings, docs[1].embeddings, atol=1e-4)
    assert load_artifact(second).manifest['parent'] == 'first'


def test_one_engine_embeds_texts_and_pictures_together(folders):
    engine = build_engine(str(folders[1]))
    blob = picture(TEXTS[0])
    docs = DocumentArray(
        [
            Document(blob=blob),
            Document(text='red shoe'),
            Document(blob=b'no picture'),
            Document(text='blue hat'),
            Document(text='a caption', blob=blob, modality='image'),
        ]
    )
    failures = engine.encode_documents(docs)
    assert [position for position, _ in failures] == [2]
    assert docs[2].embedding is None
    text = build_engine(str(folders[1]), select_model=TEXT_TOWER)
    expected = finetuner.encode(text, ['red shoe', 'blue hat'])
    np.testing.assert_allclose([docs[1].embedding, docs[3].embedding], expected, atol=1e-6)
    assert docs[0].embedding is not None
    with pytest.raises(ConfigError, match='select_model'):
        finetuner.encode(engine, ['red shoe'])


def test_pairs_of_one_text_have_one_number():
    from finetuner.data.loading import build_dataset

    dataset = build_dataset(pairs(2))
    numbers = dataset.label_values[0::2, 0].tolist()
    assert numbers == [0, 1, 2, 3, 4, 5] * 2
    part = dataset.subset(np.array([7, 2, 1]))
    assert part.label_values.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 1]]


CLASSES = DocumentArray(
    Document(text=text, tags={'finetuner_label': text.split()[1]}) for text in TEXTS
)
WRONG = {
    'class data': ({}, CLASSES, DataError, 'learns from text-image pairs'),
    'one text': ({}, pairs(3)[::6], DataError, 'same text'),
    'odd batch': ({'batch_size': 7}, pairs(), DataError, 'whole pairs.*use 6'),
    'other loss': ({'loss': 'TripletMarginLoss'}, pairs(), ConfigError, 'CLIPLoss'),
    'miner': ({'miner': 'BatchHardMiner'}, pairs(), ConfigError, 'mines by class labels'),
    'sampler': ({'sampler': 'class'}, pairs(), ConfigError, "use 'auto'"),
    'whiten': ({'whiten': True}, pairs(), ConfigError, 'class data'),
    'option': ({'model_options': {'pooler': 'cls'}}, pairs(), ConfigError, 'pooler'),
    'temperature': ({'loss_options': {'temperature': 0}}, pairs(), ConfigError, 'above 0'),
}


@pytest.mark.parametrize('name', WRONG)
def test_what_cannot_work_is_refused(folders, name):
    parameters, docs, error, message = WRONG[name]
    chosen = joined(folders, **parameters)
    with pytest.raises(error, match=message):
        validate_run(chosen, data_of(chosen, docs))


def test_wrong_models_are_refused(folders, tmp_path):
    clip = config(str(folders[1]), output_dim=8)
    with pytest.raises(ConfigError, match='output_dim=8: the towers of clip'):
        validate_run(clip, data_of(clip, pairs()))
    single = config('efficientnet-lite0')
    with pytest.raises(DataError, match='one tower'):
        validate_run(single, data_of(single, pairs()))
    own = config(str(folders[0]), loss='CLIPLoss')
    with pytest.raises(ConfigError, match='CLIPLoss learns from text-image pairs only'):
        validate_run(own, data_of(own, CLASSES))
    with pytest.raises(ConfigError, match='text encoder first'):
        get_backbone('efficientnet-lite0+all-MiniLM-L6-v2')
    with pytest.raises(ConfigError, match='cannot be compared before they are trained'):
        finetuner.build_model('all-MiniLM-L6-v2+efficientnet-lite0')
    with pytest.raises(ConfigError, match="'clip-text'"):
        build_engine(str(folders[1]), select_model='clip-texts')
    with pytest.raises(ConfigError, match='single model'):
        build_engine(str(folders[0]), select_model=TEXT_TOWER)
    with pytest.raises(ConfigError, match='it has places for no others'):
        build_engine(str(folders[1]), {'input_size': 64})


def test_a_changed_tower_is_found_out(folders, tmp_path):
    directory = tmp_path / 'artifact'
    execute(joined(folders, epochs=1, learning_rate=1e-5, freeze=True), directory)
    (directory / VISION_TOWER / 'artifact.json').write_text('{}')
    with pytest.raises(ArtifactError, match='changed after'):
        load_artifact(directory)


def labelled(texts=True):
    """Class data of one side: the texts, or two pictures of each."""
    if texts:
        return DocumentArray(Document(text=t, tags={'finetuner_label': t}) for t in TEXTS)
    return DocumentArray(
        Document(blob=picture(t, seed), tags={'finetuner_label': t})
        for t in TEXTS
        for seed in (77, 78)
    )


def evaluated(folders, directory, options, **parameters):
    named = {
        'query_data': 'queries',
        **({} if options.get('multi_modal') else {'index_data': 'index'}),
    }
    chosen = joined(
        folders,
        epochs=1,
        learning_rate=1e-4,
        callbacks=[{'name': 'EvaluationCallback', 'options': {**named, 'limit': 2, **options}}],
        **parameters,
    )
    queries = pairs(1) if options.get('multi_modal') else labelled()
    return execute(chosen, directory, more={'queries': queries, 'index': labelled(texts=False)})


@pytest.mark.parametrize(
    'options',
    [{'model': TEXT_TOWER, 'index_model': VISION_TOWER}, {}, {'multi_modal': True}],
    ids=['named', 'by content', 'pairs'],
)
def test_texts_are_evaluated_against_pictures(folders, tmp_path, options):
    directory = tmp_path / 'artifact'
    observer = evaluated(folders, directory, options)
    after = dict(observer.evaluations)['after']
    found = next(value for name, value in after.items() if name.endswith('reciprocal_rank'))
    # the same by hand, with the artifact
    engine = load_engine(directory, is_onnx=False)
    queries, index = labelled(), labelled(texts=False)
    if options.get('multi_modal'):
        index = DocumentArray(pair.chunks[1] for pair in pairs(1))
        for doc, text in zip(index, TEXTS, strict=True):
            doc.tags['finetuner_label'] = text
    for docs in (queries, index):
        finetuner.encode(engine, docs)
    labels = [[doc.tags['finetuner_label'] for doc in docs] for docs in (queries, index)]
    expected = evaluate_embeddings(
        queries.embeddings, labels[0], index.embeddings, labels[1], limit=2
    )
    assert found == pytest.approx(expected['reciprocal_rank'], abs=1e-6)


EVALUATIONS_REFUSED = {
    'unknown tower': ({'model': 'clip-txt'}, ConfigError, "'clip-text'"),
    'wrong tower': ({'model': VISION_TOWER}, DataError, 'Document 0 holds no picture'),
    'pairs and index': (
        {'multi_modal': True, 'index_data': 'index'},
        ConfigError,
        'leave out index_data',
    ),
}


@pytest.mark.parametrize('name', EVALUATIONS_REFUSED)
def test_evaluations_that_cannot_be_are_refused(folders, tmp_path, name):
    options, error, message = EVALUATIONS_REFUSED[name]
    with pytest.raises(error, match=message):
        evaluated(folders, tmp_path / 'artifact', options)


def test_queries_of_both_kinds_need_a_tower(folders, tmp_path):
    mixed = DocumentArray([*labelled(), *labelled(texts=False)])
    callback = {'name': 'EvaluationCallback', 'options': {'query_data': 'queries'}}
    chosen = joined(folders, callbacks=[callback])
    with pytest.raises(DataError, match='holds a text and Document 6 a picture'):
        validate_run(chosen, data_of(chosen, pairs(), {'queries': mixed}))
