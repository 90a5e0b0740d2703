"""Tables of experiments, runs, pushed data and names for artifacts.

A change here needs a new file in `storage/migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, String, Text
from sqlalchemy import UniqueConstraint as Unique
from sqlalchemy.orm import Mapped, mapped_column, relationship

from finetuner.storage.database import Base, UtcDateTime

# SQLite numbers rows by itself only in a column of exactly the type INTEGER.
RowNumber = BigInteger().with_variant(Integer(), 'sqlite')


class ExperimentRow(Base):
    """A named group of runs; names are unique to their owner, '' for this machine's own."""

    __tablename__ = 'experiments'
    __table_args__ = (Unique('owner', 'name'), {'sqlite_autoincrement': True})

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    description: Mapped[str] = mapped_column(Text, default='')
    owner: Mapped[str] = mapped_column(String(200), default='')
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class RunRow(Base):
    """A run; `launcher_*` is the process that made it, `worker_*` the one that does it.

    A mark tells a process from a later one with the same id. Ids are never used again: they name
    the runs' directories. `queue` is null for a run that its launcher starts itself; `retries`
    counts the workers that replaced one that died; `beats` grows as long as the worker lives.
    """

    __tablename__ = 'runs'
    __table_args__ = (
        Unique('experiment_id', 'name'),
        Unique('artifact_id'),
        Index(None, 'status'),
        # the newest run of an experiment that has finished
        Index(None, 'experiment_id', 'status', 'finished_at'),
        {'sqlite_autoincrement': True},
    )

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True)
    experiment_id: Mapped[int] = mapped_column(ForeignKey('experiments.id', ondelete='CASCADE'))
    name: Mapped[str] = mapped_column(String(200))
    status: Mapped[str] = mapped_column(String(16))
    details: Mapped[str] = mapped_column(Text, default='')
    description: Mapped[str] = mapped_column(Text, default='')
    config: Mapped[dict[str, Any]] = mapped_column(JSON)
    artifact_id: Mapped[str] = mapped_column(String(24))
    owner: Mapped[str | None] = mapped_column(String(200))
    public: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    progress: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    host: Mapped[str] = mapped_column(String(255))
    launcher_pid: Mapped[int] = mapped_column(BigInteger)
    launcher_mark: Mapped[str] = mapped_column(String(80))
    worker_pid: Mapped[int | None] = mapped_column(BigInteger)
    worker_mark: Mapped[str | None] = mapped_column(String(80))
    queue: Mapped[str | None] = mapped_column(String(16))
    retries: Mapped[int] = mapped_column(Integer, default=0)
    max_retries: Mapped[int] = mapped_column(Integer, default=0)
    beats: Mapped[int] = mapped_column(BigInteger, default=0)

    experiment: Mapped[ExperimentRow] = relationship(lazy='joined', innerjoin=True)


class LogLineRow(Base):
    """A line of a run's log; ids grow with time, so 'after id' means 'new since'."""

    __tablename__ = 'log_lines'
    __table_args__ = (Index(None, 'run_id', 'id'), {'sqlite_autoincrement': True})

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey('runs.id', ondelete='CASCADE'))
    time: Mapped[datetime] = mapped_column(UtcDateTime)
    level: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)


class MetricRow(Base):
    """A value measured while training; `step` is null for values of a whole epoch."""

    __tablename__ = 'metrics'
    __table_args__ = (Index(None, 'run_id', 'name', 'id'),)

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey('runs.id', ondelete='CASCADE'))
    step: Mapped[int | None] = mapped_column(Integer)
    epoch: Mapped[int] = mapped_column(Integer)
    name: Mapped[str] = mapped_column(String(200))
    # Null stands for nan, which SQLite cannot keep.
    value: Mapped[float | None] = mapped_column(Float)


class EvaluationRow(Base):
    """What evaluation found at a stage of a run, 'before' or 'after' fine-tuning."""

    __tablename__ = 'evaluations'

    run_id: Mapped[int] = mapped_column(ForeignKey('runs.id', ondelete='CASCADE'), primary_key=True)
    stage: Mapped[str] = mapped_column(String(16), primary_key=True)
    metrics: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    examples: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class DatasetRow(Base):
    """A name that an owner has given to pushed data."""

    __tablename__ = 'datasets'

    owner: Mapped[str] = mapped_column(String(200), primary_key=True, default='')
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))
    num_documents: Mapped[int] = mapped_column(BigInteger)
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    public: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class HoldingRow(Base):
    """Data that an owner has stored: whoever has not may not read it, though its hash be known."""

    __tablename__ = 'holdings'

    owner: Mapped[str] = mapped_column(String(200), primary_key=True, default='')
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class AliasRow(Base):
    """A name that an owner has given to an artifact: one of a run, or one that was brought here.

    It does not refer to the run: that may be another owner's, who may delete it or stop sharing it.
    """

    __tablename__ = 'aliases'
    __table_args__ = (Index(None, 'artifact_id'),)

    owner: Mapped[str] = mapped_column(String(200), primary_key=True, default='')
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    label: Mapped[str] = mapped_column(String(200), primary_key=True)
    artifact_id: Mapped[str] = mapped_column(String(24))
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)
