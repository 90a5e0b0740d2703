"""Find similar pictures: index the emoji of three artists, then ask with those of the fourth.

finetuner serve flows/search.yml     # in another terminal
python examples/similar.py
"""

from __future__ import annotations

import argparse

from emoji_data import QUERY_ARTIST, load_emoji
from jina import Client

LIMIT = 3


def main() -> None:
    """Index, search, and print what was found for some and how often it was the same thing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--port', type=int, default=51000)
    parser.add_argument('--concepts', type=int, default=250, help='how many are indexed')
    arguments = parser.parse_args()
    client = Client(host='127.0.0.1', port=arguments.port)

    pictures = load_emoji('test', blobs=True)[: 4 * arguments.concepts]
    queries = pictures.find({'tags__artist': {'$eq': QUERY_ARTIST}})
    others = pictures.find({'tags__artist': {'$neq': QUERY_ARTIST}})
    client.post('/index', others)
    state = client.post('/index_info')[0].tags
    print(f'{state["count"]:.0f} pictures in the index, embedded by {state["model"]}')

    found = client.post('/search', queries, parameters={'limit': LIMIT}, results_in_order=True)
    for query in found[:5]:
        names = [f'{m.tags["concept"]} ({m.scores["cosine"].value:.2f})' for m in query.matches]
        print(f'{query.tags["concept"]:<24} {", ".join(names)}')
    hits = [
        any(match.tags['concept'] == query.tags['concept'] for match in query.matches)
        for query in found
    ]
    print(f'the same thing is among the first {LIMIT} for {sum(hits)} of {len(hits)} pictures')


if __name__ == '__main__':
    main()
