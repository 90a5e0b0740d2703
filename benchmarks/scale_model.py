"""What encoding costs: unit costs as measured, and what comes of them for data sets of any size.

Arithmetic alone; `scale_events.py` simulates what this cannot tell, `scale_costs.py` measures.
"""

from __future__ import annotations

import collections
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DAY = 86_400.0


@dataclass(frozen=True)
class Work:
    """A data set to encode, and what a document of it costs on one core.

    Attributes:
        num_documents: of all shards.
        rows_per_shard: of each but the last.
        rows_per_lot: that are read and decoded while the lot before them is embedded.
        read_seconds: of a core, a document: from the file to a row.
        decode_seconds: of a core: to pixels or token ids.
        embed_seconds: of a core, or of an accelerator where workers have one.
        write_seconds: of a core: to the output file.
        bytes_in: read from the storage, a document.
        bytes_out: written to it.
        shard_seconds: that a worker spends on a shard whatever it holds: files, hashes, manifest.
    """

    num_documents: int
    rows_per_shard: int = 10_000
    rows_per_lot: int = 1024
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    embed_seconds: float = 0.0
    write_seconds: float = 0.0
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    shard_seconds: float = 0.0

    @property
    def shards(self) -> list[int]:
        """Documents of each."""
        whole, rest = divmod(self.num_documents, self.rows_per_shard)
        return [self.rows_per_shard] * whole + ([rest] if rest else [])

    @property
    def core_seconds(self) -> float:
        """Of a document, through all stages."""
        return self.read_seconds + self.decode_seconds + self.embed_seconds + self.write_seconds


@dataclass(frozen=True)
class Machines:
    """What encodes.

    Attributes:
        num_nodes: that fail each by itself.
        workers_per_node: processes that share the cores of their node; each embeds with one thread.
        cores: of a node.
        has_accelerator: whether a worker embeds on a GPU of its own, beside the cores.
        crowded_speed: of a core when all cores of its node compute, relative to when it is alone.
        storage_bytes: a second, shared by all who read and write at the moment.
        client_bytes: a second, at most for one of them.
        plan_seconds: of the driver, before the first shard.
        dispatch_seconds: of the driver, a shard: to hand it out, and to take down what came of it.
        start_seconds: of a worker: the process and its engine.
        mean_life_seconds: of a node between two failures; infinite for none.
        repair_seconds: until a node is there again.
    """

    num_nodes: int = 1
    workers_per_node: int = 1
    cores: int = 1
    has_accelerator: bool = False
    crowded_speed: float = 1.0
    storage_bytes: float = math.inf
    client_bytes: float = math.inf
    plan_seconds: float = 0.0
    dispatch_seconds: float = 0.0
    start_seconds: float = 0.0
    mean_life_seconds: float = math.inf
    repair_seconds: float = 60.0

    @property
    def num_workers(self) -> int:
        """Of all nodes."""
        return self.num_nodes * self.workers_per_node


@dataclass
class Outcome:
    """What came of a simulation.

    Attributes:
        seconds: from the start of the driver to the last shard.
        written: how often each shard was finished.
        failures: of nodes.
        repeated: shards that were begun anew after one.
        busy: the share of those seconds in which each of `cores`, `accelerators`, `storage` and
            `driver` was used.
        most_held: the most lots that a worker ever held, read and not yet written.
    """

    seconds: float = 0.0
    written: collections.Counter[int] = field(default_factory=collections.Counter)
    failures: int = 0
    repeated: int = 0
    busy: dict[str, float] = field(default_factory=dict)
    most_held: int = 0


@dataclass(frozen=True)
class KindCosts:
    """What a document of a kind costs, on one core that is alone.

    Attributes:
        read_seconds: from the input file to a row.
        decode_seconds: to pixels or token ids.
        embed_seconds: by the engine, with one thread.
        write_seconds: to the output file.
        crowded_speed: of a core when all of them embed, relative to when it is alone.
        bytes_in: of a row of the input, in Parquet.
        bytes_held: of its pixels or token ids, in memory.
        bytes_out: of a row of the output, in Parquet.
        bytes_indexed: of memory in an exact index.
        dimension: of the embedding.
        rows_per_lot: that are read and decoded at a time.
    """

    read_seconds: float
    decode_seconds: float
    embed_seconds: float
    write_seconds: float
    crowded_speed: float
    bytes_in: float
    bytes_held: float
    bytes_out: float
    bytes_indexed: float
    dimension: int
    rows_per_lot: int


@dataclass(frozen=True)
class UnitCosts:
    """What was measured on one machine.

    Attributes:
        cores: of the machine.
        kinds: `texts` and `pictures`.
        load_seconds: until an engine has answered once, in a process that has imported nothing.
        worker_seconds: the same from the start of a new process on.
        worker_core_seconds: of cores, that such a start takes: what counts where several start.
        worker_bytes: resident in such a process.
        ray_seconds: of a cluster of one machine, from its start to its end, that does next to nothing.
        actor_seconds: until an actor of Ray is there, without its engine.
        shard_seconds: of a worker, a shard beyond its rows.
        plan_seconds: of the driver, a shard: to plan it, and to list it in the end.
        dispatch_seconds: of the driver, a shard, by `processes` and by `ray`.
        shard_bytes: of plan and manifests, a shard.
        disk_write: bytes a second, with fsync.
        disk_read: bytes a second, not from memory.
        hash_bytes: bytes a second of SHA-256, on one core.
        search_seconds: of a core, for a query over 1e9 bytes of embeddings.
        run_seconds: of a run that trains next to nothing.
        run_core_seconds: of cores, that it takes.
        store_seconds: of a write of log lines and a sign of life to SQLite.
        measured: small cases: `kind`, `documents`, `rows_per_shard`, `workers`, `how`, `seconds`.
        queue: runs that waited for slots: `runs`, `slots`, `seconds`.
    """

    cores: int
    kinds: dict[str, KindCosts]
    load_seconds: dict[str, float]
    worker_seconds: dict[str, float]
    worker_core_seconds: dict[str, float]
    worker_bytes: float
    ray_seconds: float
    actor_seconds: float
    shard_seconds: float
    plan_seconds: float
    dispatch_seconds: dict[str, float]
    shard_bytes: float
    disk_write: float
    disk_read: float
    hash_bytes: float
    search_seconds: float
    run_seconds: float
    run_core_seconds: float
    store_seconds: float
    measured: list[dict[str, Any]] = field(default_factory=list)
    queue: list[dict[str, Any]] = field(default_factory=list)

    def starts(self, kind: str, how: str, workers: int, cores: int) -> float:
        """Seconds until workers that start at once have their engines: on a node they share cores."""
        alone = self.load_seconds[kind] if how == 'here' else self.worker_seconds[kind]
        return max(alone, workers * self.worker_core_seconds[kind] / cores)

    def runs(self, slots: int) -> float:
        """Seconds of a run that trains next to nothing, beside others in so many slots."""
        return max(self.run_seconds, slots * self.run_core_seconds / self.cores)


def load_costs(path: Path) -> UnitCosts:
    """Read what `scale_costs.py --json` wrote."""
    values = json.loads(path.read_text(encoding='utf-8'))
    kinds = {name: KindCosts(**each) for name, each in values.pop('kinds').items()}
    return UnitCosts(kinds=kinds, **values)


def work_of(costs: UnitCosts, kind: str, num_documents: int, rows_per_shard: int = 10_000) -> Work:
    """A data set of a kind, its costs filled in."""
    unit = costs.kinds[kind]
    return Work(
        num_documents,
        rows_per_shard,
        unit.rows_per_lot,
        unit.read_seconds,
        unit.decode_seconds,
        unit.embed_seconds,
        unit.write_seconds,
        unit.bytes_in,
        unit.bytes_out,
        costs.shard_seconds,
    )


def small_case(costs: UnitCosts, case: dict[str, Any]) -> tuple[Work, Machines]:
    """What a measured case is to the simulation: this machine, its disk, its cores."""
    kind, workers, how = case['kind'], case['workers'], case['how']
    work = work_of(costs, kind, case['documents'], case['rows_per_shard'])
    ray = how == 'ray'
    start = costs.starts(kind, how, workers, costs.cores)
    machines = Machines(
        workers_per_node=workers,
        cores=costs.cores,
        crowded_speed=costs.kinds[kind].crowded_speed,
        storage_bytes=min(costs.disk_write, costs.disk_read),
        plan_seconds=costs.plan_seconds * len(work.shards) + (costs.ray_seconds if ray else 0.0),
        dispatch_seconds=costs.dispatch_seconds['ray' if ray else 'processes'],
        start_seconds=start + (costs.actor_seconds if ray else 0.0),
    )
    return work, machines


@dataclass(frozen=True)
class Site:
    """What there is for a data set; assumptions, none of them measured.

    Attributes:
        num_nodes: machines or pods.
        cores: of each, a worker on each core.
        memory: bytes of each.
        storage_bytes: a second, of the storage that all share.
        hours: in which it should be encoded.
        query_seconds: in which an exact search should answer, on all cores.
        files: that a folder should hold at most.
    """

    num_nodes: int
    cores: int = 4
    memory: float = 16 * 2**30
    storage_bytes: float = 500e6
    hours: float = 24.0
    query_seconds: float = 1.0
    files: float = 1e6

    @property
    def num_cores(self) -> int:
        """Of all nodes."""
        return self.num_nodes * self.cores


@dataclass(frozen=True)
class Demand:
    """What a data set asks for.

    Attributes:
        core_seconds: to encode it, cores being busy side by side.
        bytes_in: to read.
        bytes_out: to write.
        num_shards: that it is divided into.
        num_files: of the output.
        driver_seconds: of the one process that plans and hands out.
        plan_bytes: of plan and manifests, which the driver holds.
        resume_seconds: of the driver, to hash all that is there before it goes on.
        index_bytes: of memory for an exact index.
        search_core_seconds: of a query, over all rows.
    """

    core_seconds: float
    bytes_in: float
    bytes_out: float
    num_shards: int
    num_files: int
    driver_seconds: float
    plan_bytes: float
    resume_seconds: float
    index_bytes: float
    search_core_seconds: float


def demand_of(costs: UnitCosts, kind: str, num_documents: int, how: str = 'ray') -> Demand:
    """What a data set asks for, in shards of 10,000 rows."""
    unit, work = costs.kinds[kind], work_of(costs, kind, num_documents)
    num_shards = len(work.shards)
    bytes_out = num_documents * unit.bytes_out
    cores = num_documents * work.core_seconds + num_shards * work.shard_seconds
    return Demand(
        core_seconds=cores / unit.crowded_speed,
        bytes_in=num_documents * unit.bytes_in,
        bytes_out=bytes_out,
        num_shards=num_shards,
        num_files=2 * num_shards,
        driver_seconds=num_shards * (costs.plan_seconds + costs.dispatch_seconds[how]),
        plan_bytes=num_shards * costs.shard_bytes,
        resume_seconds=bytes_out / costs.hash_bytes,
        index_bytes=num_documents * unit.bytes_indexed,
        search_core_seconds=num_documents * unit.dimension * 4 / 1e9 * costs.search_seconds,
    )


def shares_of(demand: Demand, site: Site) -> dict[str, float]:
    """How much of what there is a data set takes, by resource; more than 1 does not fit."""
    seconds = site.hours * 3600
    moved = demand.bytes_in + demand.bytes_out
    return {
        'cores': demand.core_seconds / (site.num_cores * seconds),
        'storage': moved / (site.storage_bytes * seconds),
        'driver': demand.driver_seconds / seconds,
        'files': demand.num_files / site.files,
        'index memory': demand.index_bytes / (site.num_nodes * site.memory),
        'exact query': demand.search_core_seconds / (site.num_cores * site.query_seconds),
    }


def smallest_site(demand: Demand, site: Site) -> Site:
    """The fewest nodes whose cores encode a data set in time."""
    return replace(
        site, num_nodes=max(1, math.ceil(demand.core_seconds / 3600 / site.hours / site.cores))
    )


def cluster_of(costs: UnitCosts, kind: str, site: Site) -> Machines:
    """The machines of a site, for the simulation: a worker on each core, on Ray."""
    return Machines(
        num_nodes=site.num_nodes,
        workers_per_node=site.cores,
        cores=site.cores,
        crowded_speed=costs.kinds[kind].crowded_speed,
        storage_bytes=site.storage_bytes,
        plan_seconds=costs.ray_seconds,
        dispatch_seconds=costs.plan_seconds + costs.dispatch_seconds['ray'],
        start_seconds=costs.actor_seconds + costs.starts(kind, 'ray', site.cores, site.cores),
    )


def most_cores(costs: UnitCosts, kind: str, site: Site) -> dict[str, float]:
    """Cores beyond which something else is what encoding waits for, by what that is."""
    unit, work = costs.kinds[kind], work_of(costs, kind, 10_000)
    a_document = work.core_seconds + work.shard_seconds / work.rows_per_shard
    rate = unit.crowded_speed / a_document
    dispatch = costs.plan_seconds + costs.dispatch_seconds['ray']
    return {
        'storage': site.storage_bytes / (unit.bytes_in + unit.bytes_out) / rate,
        'driver': work.rows_per_shard / dispatch / rate if dispatch else math.inf,
    }


def coarser(work: Work, most_lots: int = 2) -> Work:
    """The same data set in larger lots, which simulate faster: at most so many in a shard."""
    rows = math.ceil(work.rows_per_shard / most_lots)
    return replace(work, rows_per_lot=max(work.rows_per_lot, rows))
