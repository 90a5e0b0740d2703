"""What each choice of the recipes is worth: one thing changed at a time, drawn as pictures.

Every point is a real run of `finetuner.fit` on the emoji data, as in `recipes.py`: recall@3 of
pictures, mean reciprocal rank of texts, over the seconds of the whole run. Figures are kept as JSON
beside the pictures, so that `--draw` makes these again without training.

    python benchmarks/choices.py            # --only pictures|texts --seeds 1 --draw
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from recipes import TASKS, measure, train

import finetuner

IMAGES = Path(__file__).resolve().parents[1] / 'docs' / 'images'
# (choice, what stands for it in the picture, what is passed to fit): the recipe's own is 'recipe'
CHOICES: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    'pictures': {
        'size in training': {
            '96 px': {'model_options': {'train_input_size': 96}},
            '128 px': {},
        },
        'loss': {
            'MultiSimilarity': {},
            'TripletMargin': {'loss': 'TripletMarginLoss', 'learning_rate': 1e-4},
        },
        'learning rate': {
            '3e-4': {'learning_rate': 3e-4},
            '1e-3': {},
            '3e-3': {'learning_rate': 3e-3},
        },
        'schedule': {'cosine': {}, 'constant': {'scheduler': 'constant'}},
        'whitening': {'with': {}, 'without': {'whiten': False}},
        'augmentation': {'none': {}, 'light': {'augmentation': 'light'}},
    },
    'texts': {
        'loss': {
            'NTXent': {},
            'TripletMargin': {'loss': 'TripletMarginLoss', 'learning_rate': 2e-4},
        },
        'learning rate': {
            '5e-5': {'learning_rate': 5e-5},
            '2e-4': {},
            '5e-4': {'learning_rate': 5e-4},
        },
        'batch': {'64': {'batch_size': 64}, '192': {}, '320': {'batch_size': 320}},
        'whitening': {'without': {}, 'with': {'whiten': True}},
        'augmentation': {'none': {'augmentation': 'none'}, 'light': {}},
    },
}


def run_all(task: str, num_seeds: int) -> dict[str, Any]:
    """Train every variant; the recipe itself is trained once a seed and stands in each choice."""
    known: dict[str, dict[str, list[float]]] = {}
    found: dict[str, Any] = {'as it comes': measure(finetuner.build_model(TASKS[task][0]), task)}
    for choice, variants in CHOICES[task].items():
        found[choice] = {}
        for name, options in variants.items():
            key = json.dumps(options)
            if key not in known:
                done = [train(task, seed, options) for seed in range(num_seeds)]
                seconds, values = (list(each) for each in zip(*done, strict=True))
                known[key] = {'seconds': seconds, 'values': values}
            found[choice][name] = {**known[key], 'is_recipe': not options}
            mean = statistics.mean(known[key]['values'])
            print(f'{task}: {choice:<18} {name:<18} {mean:.3f}', flush=True)
    return found


def draw(task: str, found: dict[str, Any], path: Path) -> None:
    """Draw a row of bars for each choice, the recipe's own darker, seconds written in them."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    before = found['as it comes']
    choices = {name: variants for name, variants in found.items() if name != 'as it comes'}
    metric = 'recall@3' if task == 'pictures' else 'mean reciprocal rank'
    figure, places = pyplot.subplots(
        1, len(choices), figsize=(2.3 * len(choices) + 0.6, 3.6), sharey=True, squeeze=False
    )
    for place, (choice, variants) in zip(places[0], choices.items(), strict=True):
        means = [statistics.mean(v['values']) for v in variants.values()]
        colours = ['#1f5f8b' if v['is_recipe'] else '#a9c4d6' for v in variants.values()]
        bars = place.bar(list(variants), means, color=colours)
        for bar, variant, mean in zip(bars, variants.values(), means, strict=True):
            seconds = statistics.median(variant['seconds'])
            middle = bar.get_x() + bar.get_width() / 2
            place.text(middle, mean, f'{mean:.3f}', ha='center', va='bottom', fontsize=8)
            place.text(
                middle,
                before - 0.02,
                f'{seconds:.0f} s',
                ha='center',
                va='bottom',
                fontsize=8,
                color='white' if variant['is_recipe'] else 'black',
            )
        place.axhline(before, color='#b04a3a', linewidth=1, linestyle='--')
        place.set_title(choice, fontsize=10)
        place.tick_params(axis='x', labelsize=8, rotation=20)
    highest = max(max(v['values']) for variants in choices.values() for v in variants.values())
    places[0][0].set_ylim(before - 0.03, highest + 0.03)
    places[0][0].set_ylabel(metric)
    title = f'{TASKS[task][0]}, {task}: one thing changed at a time (dark: the recipe; dashed: untrained)'
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Train, keep the figures, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', choices=CHOICES)
    parser.add_argument('--seeds', type=int, default=1)
    parser.add_argument('--draw', action='store_true', help='draw what was kept, train nothing')
    arguments = parser.parse_args()
    for task in [arguments.only] if arguments.only else CHOICES:
        kept = IMAGES / f'choices-{task}.json'
        if not arguments.draw:
            with tempfile.TemporaryDirectory() as home:
                os.environ['FINETUNER_HOME'] = home
                found = run_all(task, arguments.seeds)
            kept.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
        draw(task, json.loads(kept.read_text(encoding='utf-8')), kept.with_suffix('.png'))


if __name__ == '__main__':
    main()
