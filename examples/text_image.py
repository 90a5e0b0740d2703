"""Fine-tune on texts and pictures: an emoji's name finds its pictures. `python examples/text_image.py`.

1,000 pairs of a picture with its name and keywords to learn from, of 250 concepts; 250 others to look
for: the name is the query, all 1,000 of their pictures are the index, and four of them are right.
"""

from __future__ import annotations

from typing import Any

from emoji_data import load_emoji_names_and_pictures, load_emoji_text_image_pairs

import finetuner
from finetuner.callback import EvaluationCallback

MODEL = 'all-MiniLM-L6-v2+efficientnet-lite0'
NUM_RIGHT, NUM_PICTURES = 4, 1_000


def main(**options: Any) -> finetuner.run.Run:
    """Fine-tune and print what it is worth.

    Args:
        options: of `finetuner.fit`.
    """
    query_data, index_data = load_emoji_names_and_pictures('test')
    evaluation = EvaluationCallback(
        query_data, index_data, model='clip-text', index_model='clip-vision', limit=NUM_RIGHT
    )
    run = finetuner.fit(MODEL, load_emoji_text_image_pairs(), callbacks=[evaluation], **options)
    for line in run.stream_logs():
        print(line)
    after = run.metrics()['after'][f'{MODEL}_recall_at_k']
    chance = NUM_RIGHT / NUM_PICTURES
    print(
        f'recall@{NUM_RIGHT} {after:.3f}, {after / chance:.0f} times what chance gives ({chance})'
    )
    return run


if __name__ == '__main__':
    main()
