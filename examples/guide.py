"""Finetuner's getting-started guide on the emoji pictures: `python examples/guide.py [epochs]`."""

import sys

import matplotlib
from docarray import Document, DocumentArray
from emoji_data import load_emoji, load_emoji_queries_and_index
from jina import Flow

import finetuner
from finetuner.callback import EvaluationCallback
from finetuner.server import FinetunerExecutor

# The pictures are 96 pixels wide. Without this they are shown to the model at its own 224 pixels,
# which takes five times as long.
MODEL_OPTIONS = {'input_size': 96}


def main(epochs: int = 5) -> None:
    """Fine-tune, look at the run, compare searches before and after, and serve the model."""
    train_data = load_emoji('train')
    query_data, index_data = load_emoji_queries_and_index('test')

    run = finetuner.fit(
        model='efficientnet-lite0',
        model_options=MODEL_OPTIONS,
        train_data=train_data,
        loss='TripletMarginLoss',
        batch_size=128,
        epochs=epochs,
        learning_rate=1e-4,
        callbacks=[EvaluationCallback(query_data=query_data, index_data=index_data, limit=3)],
    )
    for message in run.stream_logs():
        print(message)
    run.display_metrics()

    model = finetuner.get_model(run.artifact_id)
    embeddings = finetuner.encode(model=model, data=[query_data[0].uri])
    print(f'one picture: an embedding of shape {embeddings.shape}')

    pretrained_model = finetuner.build_model('efficientnet-lite0', MODEL_OPTIONS)
    results = []
    for engine in (pretrained_model, model):
        queries = finetuner.encode(model=engine, data=DocumentArray(query_data, copy=True))
        index = finetuner.encode(model=engine, data=DocumentArray(index_data, copy=True))
        queries.match(index, limit=3)
        results.append(queries)
    plot_a_difference(*results)

    flow = Flow(host='127.0.0.1').add(
        uses=FinetunerExecutor, uses_with={'artifact': run.artifact_id}
    )
    with flow:
        # the picture itself travels: a server opens no path of its clients
        picture = Document(uri=query_data[0].uri).load_uri_to_blob()
        answer = flow.post('/encode', inputs=DocumentArray([picture]))
    cosine = finetuner.cos_sim(answer[0].embedding, embeddings[0])
    print(f'the served embedding is the same: cosine {cosine:.6f}')


def plot_a_difference(pretrained_queries: DocumentArray, finetuned_queries: DocumentArray) -> None:
    """Draw the first query that the two models answer differently, with its matches."""
    matplotlib.use('Agg')  # write files, open no window
    for before, after in zip(pretrained_queries, finetuned_queries, strict=True):
        found = [[match.tags['concept'] for match in query.matches] for query in (before, after)]
        if found[0] != found[1]:
            print(f'{before.tags["concept"]}: pretrained {found[0]}, fine-tuned {found[1]}')
            before.plot_matches_sprites(output='guide-pretrained.png')
            after.plot_matches_sprites(output='guide-finetuned.png')
            return


if __name__ == '__main__':
    main(*map(int, sys.argv[1:2]))
