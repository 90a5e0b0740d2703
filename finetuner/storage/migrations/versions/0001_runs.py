"""Experiments, runs with their log, metrics and evaluations, names of pushed data."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

revision: str = '0001'
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), 'sqlite')
_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the tables."""
    _make_experiments()
    _make_runs()
    _make_what_runs_write()


def downgrade() -> None:
    """Drop the tables."""
    for table in ('metrics', 'log_lines', 'evaluations', 'runs', 'experiments', 'datasets'):
        op.drop_table(table)


def _needed(name: str, kind: Any) -> sa.Column:
    return sa.Column(name, kind, nullable=False)


def _of_run() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(['run_id'], ['runs.id'], ondelete='CASCADE')


def _make_experiments() -> None:
    op.create_table(
        'datasets',
        _needed('name', sa.String(200)),
        _needed('sha256', sa.String(64)),
        _needed('num_documents', sa.BigInteger()),
        _needed('num_bytes', sa.BigInteger()),
        _needed('created_at', _TIME),
        sa.PrimaryKeyConstraint('name'),
    )
    op.create_table(
        'experiments',
        _needed('id', _ROW_NUMBER),
        _needed('name', sa.String(200)),
        _needed('description', sa.Text()),
        sa.Column('owner', sa.String(200)),
        _needed('created_at', _TIME),
        sa.PrimaryKeyConstraint('id'),
        sa.UniqueConstraint('name'),
        sqlite_autoincrement=True,
    )


def _make_runs() -> None:
    op.create_table(
        'runs',
        _needed('id', _ROW_NUMBER),
        _needed('experiment_id', _ROW_NUMBER),
        _needed('name', sa.String(200)),
        _needed('status', sa.String(16)),
        _needed('details', sa.Text()),
        _needed('description', sa.Text()),
        _needed('config', sa.JSON()),
        _needed('artifact_id', sa.String(24)),
        sa.Column('owner', sa.String(200)),
        _needed('created_at', _TIME),
        sa.Column('started_at', _TIME),
        sa.Column('finished_at', _TIME),
        _needed('progress', sa.JSON()),
        _needed('cancel_requested', sa.Boolean()),
        _needed('host', sa.String(255)),
        _needed('launcher_pid', sa.BigInteger()),
        _needed('launcher_mark', sa.String(80)),
        sa.Column('worker_pid', sa.BigInteger()),
        sa.Column('worker_mark', sa.String(80)),
        sa.ForeignKeyConstraint(['experiment_id'], ['experiments.id'], ondelete='CASCADE'),
        sa.PrimaryKeyConstraint('id'),
        sa.UniqueConstraint('artifact_id'),
        sa.UniqueConstraint('experiment_id', 'name'),
        sqlite_autoincrement=True,
    )
    op.create_index(None, 'runs', ['status'])


def _make_what_runs_write() -> None:
    op.create_table(
        'evaluations',
        _needed('run_id', _ROW_NUMBER),
        _needed('stage', sa.String(16)),
        sa.Column('metrics', sa.JSON(none_as_null=True)),
        sa.Column('examples', sa.JSON(none_as_null=True)),
        _of_run(),
        sa.PrimaryKeyConstraint('run_id', 'stage'),
    )
    op.create_table(
        'log_lines',
        _needed('id', _ROW_NUMBER),
        _needed('run_id', _ROW_NUMBER),
        _needed('time', _TIME),
        _needed('level', sa.String(16)),
        _needed('message', sa.Text()),
        _of_run(),
        sa.PrimaryKeyConstraint('id'),
        sqlite_autoincrement=True,
    )
    op.create_index(None, 'log_lines', ['run_id', 'id'])
    op.create_table(
        'metrics',
        _needed('id', _ROW_NUMBER),
        _needed('run_id', _ROW_NUMBER),
        sa.Column('step', sa.Integer()),
        _needed('epoch', sa.Integer()),
        _needed('name', sa.String(200)),
        sa.Column('value', sa.Float()),
        _of_run(),
        sa.PrimaryKeyConstraint('id'),
    )
    op.create_index(None, 'metrics', ['run_id', 'name', 'id'])
