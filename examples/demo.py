"""The main job, end to end, on the emoji pictures: `make demo`.

Starts flows/train-and-encode.yml, posts the training pictures to /fit, watches the run, encodes
the test pictures through /encode, and draws what a search finds before and after.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault('JINA_OPTOUT_TELEMETRY', '1')
REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUT = REPOSITORY / 'demo-output'
# a home of its own: the demo leaves nothing among one's own runs
os.environ.setdefault('FINETUNER_HOME', str(OUTPUT / 'home'))
warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)

import numpy as np  # noqa: E402
from docarray import DocumentArray  # noqa: E402
from emoji_data import load_emoji, load_emoji_queries_and_index  # noqa: E402
from jina import Client, Flow  # noqa: E402

import finetuner  # noqa: E402
from finetuner.console import console, print_metrics  # noqa: E402
from finetuner.data.documents import load_contents  # noqa: E402
from finetuner.evaluation import METRICS  # noqa: E402
from finetuner.server import data_request, fit_request  # noqa: E402
from finetuner.training.progress import bar_fields, progress_bar  # noqa: E402

MODEL = 'efficientnet-lite0'
LIMIT = 3
# pictures shown larger than their 96 pixels, a loss that weighs hard pairs, and one cosine wave of
# the learning rate
PARAMETERS = {
    'model': MODEL,
    'model_options': {'input_size': 128},
    'loss': 'MultiSimilarityLoss',
    'loss_options': {'alpha': 2, 'beta': 50, 'base': 0.5},
    'optimizer': 'AdamW',
    'optimizer_options': {'weight_decay': 0},
    'learning_rate': 1e-3,
    'scheduler': 'cosine',
    'scheduler_options': {'num_warmup_steps': 0.15},
    'batch_size': 124,  # 31 classes of four: eight batches go through all 250 classes
    'epochs': 4,
    'num_workers': 0,
    'callbacks': [
        {
            'name': 'EvaluationCallback',
            'options': {
                'query_data': 'emoji-queries',
                'index_data': 'emoji-index',
                'limit': LIMIT,
                'batch_size': 64,
            },
        }
    ],
}
MAX_RUN_SECONDS = 900
# what serves may be a faster precision, chosen so that it costs no more
MOST_APART = 0.01


@dataclass(frozen=True)
class Matches:
    """What a search finds.

    Attributes:
        positions: of the nearest pictures in the index, `[queries, LIMIT]`, nearest first.
        are_right: whether each shows the query's concept.
    """

    positions: np.ndarray
    are_right: np.ndarray

    @property
    def recall(self) -> float:
        """Of the pictures to find, the share that is found: each query has as many as are shown."""
        return float(self.are_right.mean())


def main() -> int:
    """Run the demo; the exit code says whether the model got better."""
    began = time.monotonic()
    train_data = load_emoji('train')
    queries, index = load_emoji_queries_and_index('test')
    say(
        f'{len(train_data)} training pictures of 250 concepts by four artists; '
        f'{len(queries)} queries and {len(index)} pictures to find, of 250 other concepts.'
    )
    say('Starting the Flow flows/train-and-encode.yml ...')
    flow = Flow.load_config(str(REPOSITORY / 'flows' / 'train-and-encode.yml'))
    with flow:
        client = Client(host='127.0.0.1', port=grpc_port(flow), protocol='grpc')
        client.post(**data_request('emoji-queries', queries))
        client.post(**data_request('emoji-index', index))
        say('Posting the training pictures to /fit ...')
        started = client.post(**fit_request(train_data, PARAMETERS))[0].tags
        say(
            f'Run [bold]{started["run"]}[/] started; its artifact will be {started["artifact_id"]}.'
        )
        watch(client, started['run'])
        metrics = client.post('/metrics', parameters={'run': started['run']})[0].tags
        for stage in ('before', 'after'):
            # the order of tags is lost on the way
            print_metrics(stage, dict(sorted(metrics[stage].items(), key=metric_order)))
        after = encode(client, queries, index, started['artifact_id'])
    say('Drawing what the search finds, with the model as it came and fine-tuned ...')
    pretrained = finetuner.build_model(MODEL, PARAMETERS['model_options'])
    before = [
        finetuner.encode(pretrained, DocumentArray(docs, copy=True)).embeddings
        for docs in (queries, index)
    ]
    picture = OUTPUT / 'matches.png'
    matches = [find_matches(queries, index, embeddings) for embeddings in (before, after)]
    draw_matches(picture, queries, index, matches)
    recall = [metrics[stage][f'{MODEL}_recall_at_k'] for stage in ('before', 'after')]
    served = matches[1].recall
    if abs(served - recall[1]) > MOST_APART:
        sys.exit(
            f'demo: /encode gives recall@{LIMIT} {served:.3f}, the run measured {recall[1]:.3f}'
        )
    say(
        f'recall@{LIMIT} went from {recall[0]:.3f} to [bold green]{recall[1]:.3f}[/] '
        f'in {time.monotonic() - began:.0f} s, all told.'
    )
    say(f'The picture: {picture}')
    say(f'The runs, with their artifacts: {os.environ["FINETUNER_HOME"]}')
    return 0 if recall[1] > recall[0] else 1


def say(text: str) -> None:
    """Print a line of the demo's own."""
    console.print(f'[bold cyan]demo[/] {text}', highlight=False, soft_wrap=True)


def metric_order(item: tuple[str, float]) -> int:
    """Where a metric stands in Finetuner's tables, whatever its caption."""
    return next(place for place, name in enumerate(METRICS) if item[0].endswith(f'_{name}'))


def grpc_port(flow: Flow) -> int:
    """The port of the Flow's gRPC server: the first of the gateway's."""
    ports: Any = flow.port
    return int(ports[0] if isinstance(ports, list) else ports)


def watch(client: Client, run: str) -> None:
    """Show a run's log and progress until it ends.

    Raises:
        SystemExit: the run failed, or took far longer than it should.
    """
    last = 0
    deadline = time.monotonic() + MAX_RUN_SECONDS
    with progress_bar(console) as bar:
        task = bar.add_task('', total=None, epoch='-', loss='-', speed='-', left='-')
        while True:
            log = client.post('/logs', parameters={'run': run, 'after': last})[0]
            last = int(log.tags['last'])
            for line in filter(None, log.text.splitlines()):
                console.print(f'[dim]{line}[/]', highlight=False, soft_wrap=True)
            status = client.post('/status', parameters={'run': run})[0].tags
            if status.get('progress'):
                bar.update(task, **bar_fields(status['progress']))
            if log.tags['ended']:
                break
            if time.monotonic() > deadline:
                sys.exit(f'demo: the run did not end within {MAX_RUN_SECONDS} s')
            time.sleep(0.5)
    if status['status'] != 'FINISHED':
        sys.exit(f'demo: the run ended as {status["status"]}: {status.get("details")}')


def encode(
    client: Client, queries: DocumentArray, index: DocumentArray, artifact_id: str
) -> list[np.ndarray]:
    """Embed queries and index through /encode with the run's model."""
    say('Encoding the test pictures through /encode ...')
    embeddings = []
    for docs in (queries, index):
        # the files' bytes travel: a server opens no path of ours
        sent = load_contents(docs)
        answer = client.post('/encode', inputs=sent, parameters={'artifact': artifact_id})
        embeddings.append(answer.embeddings)
    say(f'{sum(map(len, embeddings))} embeddings of length {embeddings[0].shape[1]} came back.')
    return embeddings


def find_matches(
    queries: DocumentArray, index: DocumentArray, embeddings: list[np.ndarray]
) -> Matches:
    """Search the index with each query.

    Args:
        queries: pictures of the test concepts by one artist.
        index: the same concepts by the others.
        embeddings: of the queries and of the index.
    """
    from finetuner.search import search

    positions = search(*embeddings, LIMIT)[1].numpy()
    labels = np.array([doc.tags['finetuner_label'] for doc in index])
    wanted = np.array([doc.tags['finetuner_label'] for doc in queries])
    return Matches(positions, labels[positions] == wanted[:, None])


def draw_matches(
    path: Path,
    queries: DocumentArray,
    index: DocumentArray,
    matches: list[Matches],
    num_rows: int = 8,
) -> None:
    """Draw queries with their nearest pictures: right ones framed green, wrong ones red.

    The rows are spread evenly over all queries whose results changed, better or worse.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    from finetuner.images import load_picture

    right = [each.are_right for each in matches]
    changed = np.flatnonzero(right[0].sum(1) != right[1].sum(1))
    rows = changed[np.linspace(0, len(changed) - 1, min(num_rows, len(changed))).astype(int)]
    # an empty narrow column stands before each group of matches
    widths = [1, *([0.25] + [1] * LIMIT) * 2]
    figure, grid = plt.subplots(
        len(rows),
        len(widths),
        figsize=(1.15 * sum(widths) + 0.6, 1.2 * len(rows) + 1),
        width_ratios=widths,
        squeeze=False,
    )
    for axis in grid.flat:
        axis.axis('off')
    for row, query in enumerate(rows):
        show(grid[row][0], load_picture(queries[int(query)].uri, 96), '#555555', 1)
        grid[row][0].set_ylabel(
            queries[int(query)].tags['concept'].replace('-', '\n'),
            rotation=0,
            ha='right',
            va='center',
            fontsize=8,
        )
        for stage in range(2):
            for rank in range(LIMIT):
                position = int(matches[stage].positions[query][rank])
                colour = '#1a9850' if right[stage][query][rank] else '#d73027'
                axis = grid[row][first_column(stage) + rank]
                show(axis, load_picture(index[position].uri, 96), colour, 3)
    grid[0][0].set_title('query', fontsize=10)
    for stage, name in enumerate(('as it came', 'fine-tuned')):
        title = f'{name}: recall@{LIMIT} {matches[stage].recall:.3f}'
        grid[0][first_column(stage) + LIMIT // 2].set_title(title, fontsize=10)
    figure.suptitle(
        f'{len(rows)} of the {len(changed)} queries (of {len(queries)}) whose results changed',
        fontsize=9,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def first_column(stage: int) -> int:
    """The column of the nearest match, before (0) or after (1)."""
    return 2 + stage * (LIMIT + 1)


def show(axis: Any, picture: np.ndarray, colour: str, width: float) -> None:
    """Draw one picture in a frame."""
    axis.axis('on')
    axis.set_xticks([])
    axis.set_yticks([])
    axis.imshow(picture)
    for spine in axis.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(width)


if __name__ == '__main__':
    sys.exit(main())
