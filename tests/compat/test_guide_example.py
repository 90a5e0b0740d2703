"""`examples/guide.py` as it stands, on fewer pictures."""

import guide
import numpy as np
from emoji_data import load_emoji, load_emoji_queries_and_index
from PIL import Image

import finetuner


def test_the_guide_runs(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(guide, 'load_emoji', lambda split: load_emoji(split)[:160])
    monkeypatch.setattr(
        guide,
        'load_emoji_queries_and_index',
        lambda split: tuple(
            docs[:count]
            for docs, count in zip(load_emoji_queries_and_index(split), (20, 60), strict=True)
        ),
    )
    guide.main(epochs=1)
    printed = capfd.readouterr().out
    assert 'Epoch 1/1 done' in printed
    assert 'Retrieval metrics after fine-tuning:' in printed
    assert 'an embedding of shape (1, 1280)' in printed
    cosine = float(printed.partition('the served embedding is the same: cosine ')[2].split()[0])
    assert cosine >= 0.9999
    (run,) = finetuner.list_runs()
    metrics = run.metrics()
    assert metrics['before'] != metrics['after']
    for name in ('guide-pretrained.png', 'guide-finetuned.png'):
        assert np.unique(np.asarray(Image.open(tmp_path / name))).size > 50
