"""`examples/guide.py` as it stands, on fewer pictures."""

import numpy as np
from PIL import Image

import finetuner
from tests.scripts import run_script

# in a script of its own, as it starts a Flow
SCRIPT = """
import guide
from emoji_data import load_emoji, load_emoji_queries_and_index

guide.load_emoji = lambda split: load_emoji(split)[:160]

def load_few(split):
    query_data, index_data = load_emoji_queries_and_index(split)
    return query_data[:20], index_data[:60]

guide.load_emoji_queries_and_index = load_few
guide.main(epochs=1)
"""


def test_the_guide_runs(tmp_path):
    printed = run_script(SCRIPT, tmp_path)
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
