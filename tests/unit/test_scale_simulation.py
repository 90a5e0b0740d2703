"""The simulation of encoding and of waiting runs, against formulas and cases with known answers."""

import dataclasses
import importlib
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture(scope='module')
def load():
    """Imports a module of the benchmarks; what that brings in is forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], '__file__', '')):
            del sys.modules[name]


@pytest.fixture(scope='module')
def encode(load):
    return load('scale_events').simulate_encoding


@pytest.fixture(scope='module')
def model(load):
    return load('scale_model')


# runs that wait


def erlang_c(servers, offered):
    """The share of runs that wait at all, where times between and durations are exponential."""
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize('load_factor', [0.5, 0.8])
def test_runs_of_one_length_wait_as_in_m_d_1(load, load_factor):
    simulate = load('scale_events').simulate_queue
    waits = simulate(load_factor, lambda _: 1.0, 1, 40_000)
    assert statistics.mean(waits) == pytest.approx(load_factor / (2 * (1 - load_factor)), rel=0.05)


@pytest.mark.parametrize(('servers', 'load_factor'), [(1, 0.6), (2, 0.7), (5, 0.8)])
def test_runs_of_any_length_wait_as_in_m_m_c(load, servers, load_factor):
    simulate = load('scale_events').simulate_queue
    rate = servers * load_factor
    waits = simulate(rate, lambda draw: draw.expovariate(1.0), servers, 40_000)
    share = erlang_c(servers, rate)
    assert statistics.mean(wait > 0 for wait in waits) == pytest.approx(share, abs=0.02)
    expected = share / (servers - rate)
    assert statistics.mean(waits) == pytest.approx(expected, rel=0.08)


def test_runs_wait_in_turn(load):
    simulate = load('scale_events').simulate_queue
    # all at once, into two slots
    assert simulate(1e9, lambda _: 10.0, 2, 5) == pytest.approx([0, 0, 10, 10, 20], abs=1e-6)


# a storage that is shared


def shared_by_hand(transfers, total, each):
    """When each of (start, bytes) ends: all that is left is looked at between any two events."""
    ends, left, now = {}, {}, 0.0
    starts = sorted(range(len(transfers)), key=lambda i: transfers[i][0])
    while starts or left:
        rate = min(each, total / len(left)) if left else 0.0
        next_end = min((now + size / rate for size in left.values()), default=math.inf)
        next_start = transfers[starts[0]][0] if starts else math.inf
        then = min(next_end, next_start)
        left = {i: size - rate * (then - now) for i, size in left.items()}
        now = then
        for i in [i for i, size in left.items() if size <= 1e-9 * transfers[i][1]]:
            ends[i] = now
            del left[i]
        if starts and next_start <= now:
            left[starts[0]] = transfers[starts[0]][1]
            starts.pop(0)
    return [ends[i] for i in range(len(transfers))]


@settings(max_examples=100, deadline=None)
@given(
    transfers=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 100)), min_size=1, max_size=12),
    each=st.sampled_from([math.inf, 3.0]),
)
def test_a_storage_is_shared_evenly(load, transfers, each):
    simpy, storage_class = load('simpy'), load('scale_events').SharedStorage
    env = simpy.Environment()
    storage = storage_class(env, 10.0, each)
    ends = [0.0] * len(transfers)

    def move(number, start, size):
        yield env.timeout(start)
        yield from storage.move(size)
        ends[number] = env.now

    for number, (start, size) in enumerate(transfers):
        env.process(move(number, start, size))
    env.run()
    assert ends == pytest.approx(shared_by_hand(transfers, 10.0, each), rel=1e-6)
    assert storage.bytes_moved == pytest.approx(sum(size for _, size in transfers))


# encoding


@settings(max_examples=60, deadline=None)
@given(
    documents=st.integers(0, 400),
    rows=st.integers(1, 60),
    lot=st.integers(1, 30),
    nodes=st.integers(1, 3),
    workers=st.integers(1, 3),
    cores=st.integers(1, 4),
    ahead=st.integers(0, 3),
    has_accelerator=st.booleans(),
    life=st.sampled_from([math.inf, 200.0, 30.0]),
    seed=st.integers(0, 5),
)
def test_every_shard_is_written_once(
    load,
    encode,
    model,
    documents,
    rows,
    lot,
    nodes,
    workers,
    cores,
    ahead,
    has_accelerator,
    life,
    seed,
):
    work = model.Work(documents, rows, lot, 0.01, 0.02, 0.1, 0.01, 10.0, 20.0, 0.1)
    machines = model.Machines(
        nodes, workers, cores, has_accelerator, 0.8, 1000.0, 400.0, 0.5, 0.05, 1.0, life, 3.0
    )
    done = encode(work, machines, ahead, seed)
    assert sum(work.shards) == documents
    assert done.written == dict.fromkeys(range(len(work.shards)), 1)
    assert done.most_held <= ahead + 1
    assert all(0 <= share <= 1 + 1e-9 for share in done.busy.values())
    assert done.repeated <= done.failures * workers
    if math.isinf(life) and documents:
        # never faster than the cores, the storage and the driver can be
        on_cores = work.read_seconds + work.decode_seconds + work.write_seconds
        on_cores += 0 if has_accelerator else work.embed_seconds
        least = max(
            documents * on_cores / (nodes * cores),
            documents * 30.0 / machines.storage_bytes,
            len(work.shards) * machines.dispatch_seconds,
        )
        assert done.seconds >= least
        assert done.failures == done.repeated == 0


@pytest.mark.parametrize('workers', [1, 2, 4])
def test_cores_are_what_there_is_too_little_of(encode, model, workers):
    work = model.Work(8000, 500, 100, 0.001, 0.002, 0.006, 0.001, shard_seconds=0.5)
    machines = model.Machines(1, workers, workers, start_seconds=7.0, plan_seconds=2.0)
    done = encode(work, machines)
    # a core has nothing to do beside what its worker embeds, so all stages add up
    expected = 2.0 + 7.0 + (8000 * 0.010 + 16 * 0.5) / workers
    # workers that share cores sometimes wait for each other's decoding
    assert done.seconds == pytest.approx(expected, rel=0.02 if workers > 1 else 1e-9)
    assert done.busy['cores'] == pytest.approx((8000 * 0.010 + 8) / workers / done.seconds)


def test_a_core_of_its_own_hides_decoding(encode, model):
    work = model.Work(1000, 1000, 100, decode_seconds=0.004, embed_seconds=0.010)
    alone = encode(work, model.Machines(cores=1)).seconds
    beside = encode(work, model.Machines(cores=3)).seconds
    assert alone == pytest.approx(1000 * 0.014)
    # but for the first two lots, which three threads decode at once
    assert beside == pytest.approx(2 * 100 * 0.004 / 3 + 1000 * 0.010)
    ahead = encode(work, model.Machines(cores=3), num_ahead=0).seconds
    assert ahead == pytest.approx(1000 * (0.004 / 3 + 0.010)), 'nothing is read ahead'


def test_an_accelerator_waits_for_cores_that_decode(encode, model):
    work = model.Work(10_000, 1000, 100, decode_seconds=0.008, embed_seconds=0.001)
    machines = model.Machines(1, 1, 4, has_accelerator=True)
    done = encode(work, machines)
    assert done.seconds == pytest.approx(10_000 * 0.008 / 4, rel=0.06)
    assert done.busy['cores'] > 0.95
    assert done.busy['accelerators'] == pytest.approx(0.5, rel=0.05)
    fast = dataclasses.replace(work, decode_seconds=0.002)
    assert encode(fast, machines).seconds == pytest.approx(10_000 * 0.001, rel=0.06)


def test_cores_that_are_busy_side_by_side_are_slower(encode, model):
    work = model.Work(4000, 500, 500, embed_seconds=0.01)
    machines = model.Machines(1, 2, 2, crowded_speed=0.8)
    assert encode(work, machines).seconds == pytest.approx(4000 * 0.01 / 2 / 0.8, rel=0.02)
    alone = dataclasses.replace(machines, workers_per_node=1)
    assert encode(work, alone).seconds == pytest.approx(4000 * 0.01)


def test_a_storage_that_is_too_slow(encode, model):
    work = model.Work(100_000, 1000, 500, embed_seconds=1e-5, bytes_in=300.0, bytes_out=700.0)
    done = encode(work, model.Machines(5, 4, 4, storage_bytes=1e5))
    assert done.seconds == pytest.approx(100_000 * 1000 / 1e5, rel=0.02)
    assert done.busy['storage'] > 0.98
    assert done.busy['cores'] < 0.01


def test_a_driver_that_is_too_slow(encode, model):
    work = model.Work(100_000, 100, 100, embed_seconds=1e-4)
    done = encode(work, model.Machines(10, 4, 4, dispatch_seconds=0.05))
    assert done.seconds == pytest.approx(1000 * 0.05, rel=0.01)
    assert done.busy['driver'] > 0.99


def test_what_failures_cost(encode, model):
    work = model.Work(40_000, 100, 50, embed_seconds=0.01)
    machines = model.Machines(4, 2, 2, repair_seconds=20.0, start_seconds=5.0)
    calm = encode(work, machines)
    rough = encode(work, dataclasses.replace(machines, mean_life_seconds=40.0))
    assert rough.failures > 5
    assert 0 < rough.repeated <= 2 * rough.failures
    assert set(rough.written.values()) == {1}
    # each takes a node for as long as it is repaired and loads, and half of two shards
    lost = rough.failures * 2 * (20.0 + 5.0) + rough.repeated * 0.5
    assert rough.seconds == pytest.approx(calm.seconds + lost / machines.num_workers, rel=0.1)


# the cost model


@pytest.fixture(scope='module')
def costs(model):
    unit = model.KindCosts(1e-5, 4e-5, 2e-3, 1e-5, 0.8, 150.0, 400.0, 1600.0, 1556.0, 384, 1024)
    return model.UnitCosts(
        cores=2,
        kinds={'texts': unit},
        load_seconds={'texts': 3.0},
        worker_seconds={'texts': 6.0},
        worker_core_seconds={'texts': 5.0},
        worker_bytes=4e8,
        ray_seconds=4.0,
        actor_seconds=1.0,
        shard_seconds=0.03,
        plan_seconds=0.001,
        dispatch_seconds={'processes': 0.0002, 'ray': 0.01},
        shard_bytes=1200.0,
        disk_write=4e8,
        disk_read=8e8,
        hash_bytes=1e9,
        search_seconds=0.3,
        run_seconds=15.0,
        run_core_seconds=20.0,
        store_seconds=0.003,
    )


@pytest.mark.parametrize(
    ('changed', 'there', 'first'),
    [
        ({}, {'num_nodes': 1, 'hours': 0.1}, 'cores'),
        ({}, {'num_nodes': 1000, 'storage_bytes': 1e6}, 'storage'),
        ({'plan_seconds': 20.0}, {'num_nodes': 1000, 'memory': 1e13}, 'driver'),
        ({}, {'num_nodes': 1000, 'files': 100.0}, 'files'),
        ({}, {'num_nodes': 1000, 'memory': 1e5}, 'index memory'),
        ({'search_seconds': 1e6}, {'num_nodes': 1000}, 'exact query'),
    ],
)
def test_the_first_bottleneck(model, costs, changed, there, first):
    site = model.Site(**there)
    asked = model.demand_of(dataclasses.replace(costs, **changed), 'texts', 10**8)
    shares = model.shares_of(asked, site)
    assert max(shares, key=shares.get) == first


def test_the_model_and_the_simulation_agree(model, costs, encode):
    site = model.Site(num_nodes=4)
    # shards in whole rounds of 16 workers: of others the last round is not full
    for size in (800_000, 3_200_000):
        work = model.coarser(model.work_of(costs, 'texts', size))
        machines = model.cluster_of(costs, 'texts', site)
        asked = model.demand_of(costs, 'texts', size)
        fixed = machines.plan_seconds + machines.start_seconds
        expected = fixed + asked.core_seconds / site.num_cores
        assert encode(work, machines).seconds == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize('name', ['storage', 'driver'])
def test_more_cores_help_no_more(model, costs, encode, name):
    costs = dataclasses.replace(costs, dispatch_seconds={'ray': 0.25 if name == 'driver' else 0.0})
    site = model.Site(1, storage_bytes=math.inf if name == 'driver' else 1e7)
    most = model.most_cores(costs, 'texts', site)
    assert min(most, key=most.get) == name
    seconds = {}
    for factor in (0.5, 1.0, 2.0):
        nodes = round(factor * most[name] / site.cores)
        machines = dataclasses.replace(
            model.cluster_of(costs, 'texts', dataclasses.replace(site, num_nodes=nodes)),
            plan_seconds=0.0,
            start_seconds=0.0,
        )
        work = model.coarser(model.work_of(costs, 'texts', 2 * 10**7))
        seconds[factor] = encode(work, machines).seconds
    # where both are about as fast neither is quite busy
    assert seconds[0.5] > 1.4 * seconds[1.0]
    assert seconds[2.0] > 0.8 * seconds[1.0]
    assert seconds[0.5] > 1.8 * seconds[2.0]


def test_costs_are_read_as_they_were_written(model, costs, tmp_path):
    path = tmp_path / 'costs.json'
    path.write_text(json.dumps(dataclasses.asdict(costs)))
    assert model.load_costs(path) == costs


@pytest.fixture(scope='module')
def measured(costs):
    case = {'kind': 'texts', 'documents': 6000, 'rows_per_shard': 500, 'seconds': 20.0}
    ways = [('here', 1), ('processes', 2), ('ray', 2)]
    return dataclasses.replace(
        costs,
        measured=[{**case, 'how': how, 'workers': workers} for how, workers in ways],
        queue=[{'runs': 3, 'slots': 2, 'seconds': 40.0}],
    )


def test_small_cases_are_simulated_as_they_are(load, measured):
    _, here, processes, ray, runs = load('scale_tables').small_cases(measured)
    # twelve shards, and a core beside the one that embeds and writes, which decodes; both together
    # are slower than one: 0.9 of the way for most of the time
    seconds = float(here.split()[-2])
    assert 3 + 12 * (0.03 + 500 * 2.02e-3) < seconds < 3 + 12 * (0.03 + 500 * 2.06e-3) / 0.8
    seconds = float(processes.split()[-2])
    assert seconds == pytest.approx(6 + 6 * (0.03 + 500 * 2.06e-3) / 0.8, rel=0.05)
    assert float(ray.split()[-2]) == pytest.approx(seconds + 4 + 1, rel=0.05)
    # two rounds, of two runs that share two cores
    assert float(runs.split()[-2]) == pytest.approx(2 * 20, abs=0.06)


def test_what_starts_at_once_shares_the_cores(costs):
    # alone it waits for its disk a while; beside others it waits for a core
    assert costs.starts('texts', 'here', 1, cores=2) == 3
    assert costs.starts('texts', 'processes', 2, cores=2) == 6
    assert costs.starts('texts', 'processes', 4, cores=2) == 4 * 5 / 2
    assert costs.starts('texts', 'ray', 4, cores=4) == 6
    assert costs.runs(1) == 15
    assert dataclasses.replace(costs, cores=2).runs(3) == 3 * 20 / 2


def test_tables_are_printed_and_put_into_documents(load, measured, tmp_path, monkeypatch, capsys):
    simulation, tables = load('scale_simulation'), load('scale_tables')
    monkeypatch.setattr(tables, 'SIZES', (10**5, 10**6))
    monkeypatch.setattr(tables, '_NUM_RUNS', 200)
    path, document = tmp_path / 'costs.json', tmp_path / 'document.md'
    path.write_text(json.dumps(dataclasses.asdict(measured)))
    document.write_text('before\n<!-- table: demands -->\n```text\nold\n```\nafter\n')

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['scale_simulation.py', str(path), *arguments])
        simulation.main()
        return capsys.readouterr().out

    shown = run('--hours', '1', '--storage-mb', '50')
    assert all(f'\n{name}\n---' in shown for name in ('unit costs', 'simulations', 'queue'))
    asked = run('--only', 'demands').partition('\n')[2].partition('\n')[2].partition('\n')[2]
    assert '1e+06 texts' in asked
    run('--only', 'demands', '--update', str(document))
    expected = f'before\n<!-- table: demands -->\n```text\n{asked}```\nafter\n'
    assert document.read_text() == expected
    with pytest.raises(SystemExit, match='there is no block behind <!-- table: shares -->'):
        run('--only', 'shares', '--update', str(document))
    with pytest.raises(SystemExit, match='there is no table'):
        run('--only', 'other')


@pytest.mark.parametrize('name', ['unit costs', 'small cases', 'demands', 'shares'])
def test_the_document_shows_what_was_measured(load, model, name):
    simulation = load('scale_simulation')
    costs = model.load_costs(simulation.COSTS)
    text = (BENCHMARKS.parent / 'docs/scale.md').read_text()
    lines = simulation.tables(costs, model.Site(1))[name]()
    mend = 'python benchmarks/scale_simulation.py --update docs/scale.md'
    assert simulation.updated(text, name, lines) == text, mend
