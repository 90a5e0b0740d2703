"""Fine-tune on texts: an emoji's name finds its keywords. `python examples/texts.py`.

250 concepts to learn from, a name and a list of keywords each; 250 others to look for: the name is
the query, the keyword lists are the index, and one of them is right.
"""

from __future__ import annotations

from typing import Any

from emoji_data import load_emoji_text_queries_and_index, load_emoji_texts

import finetuner
from finetuner.callback import EvaluationCallback

MODEL = 'all-MiniLM-L6-v2'


def main(**options: Any) -> finetuner.run.Run:
    """Fine-tune and print what it changed.

    Args:
        options: of `finetuner.fit`, in the place of those below.
    """
    query_data, index_data = load_emoji_text_queries_and_index('test')
    run = finetuner.fit(
        MODEL,
        load_emoji_texts('train'),
        callbacks=[EvaluationCallback(query_data, index_data)],
        **{
            'loss': 'NTXentLoss',
            'num_items_per_class': 2,
            'batch_size': 128,
            'epochs': 5,
            'learning_rate': 1e-4,
            'optimizer': 'AdamW',
            'scheduler': 'linear',
            'scheduler_options': {'num_warmup_steps': 0.1},
            **options,
        },
    )
    for line in run.stream_logs():
        print(line)
    name = f'{MODEL}_reciprocal_rank'
    before, after = (run.metrics()[stage][name] for stage in ('before', 'after'))
    print(f'mean reciprocal rank {before:.3f} before, {after:.3f} after')
    return run


if __name__ == '__main__':
    main()
