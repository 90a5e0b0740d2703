"""Owners of experiments, runs and data; tokens; the queue of runs."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = '0002'
down_revision: str | None = '0001'
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_TIME = sa.DateTime(timezone=True)
_NUMBERED = {'sqlite_autoincrement': True}


def upgrade() -> None:
    """Give everything that is there to this machine's own user, ''."""
    for table in ('experiments', 'runs'):
        op.execute(f"UPDATE {table} SET owner = '' WHERE owner IS NULL")
    with op.batch_alter_table('experiments', table_kwargs=_NUMBERED) as experiments:
        experiments.alter_column('owner', existing_type=sa.String(200), nullable=False)
        experiments.drop_constraint('uq_experiments_name', type_='unique')
        experiments.create_unique_constraint('uq_experiments_owner_name', ['owner', 'name'])
    # not by a copy of the table: that would forget which numbers were used, and they name directories
    op.add_column('runs', _needed('public', sa.Boolean(), sa.false()))
    op.add_column('runs', sa.Column('queue', sa.String(16)))
    op.add_column('runs', _needed('retries', sa.Integer(), '0'))
    op.add_column('runs', _needed('max_retries', sa.Integer(), '0'))
    op.add_column('runs', _needed('beats', sa.BigInteger(), '0'))
    with op.batch_alter_table('datasets') as datasets:
        datasets.add_column(_needed('owner', sa.String(200), ''))
        datasets.add_column(_needed('public', sa.Boolean(), sa.false()))
        datasets.drop_constraint('pk_datasets', type_='primary')
        datasets.create_primary_key('pk_datasets', ['owner', 'name'])
    op.create_table(
        'holdings',
        _needed('owner', sa.String(200)),
        _needed('sha256', sa.String(64)),
        _needed('created_at', _TIME),
        sa.PrimaryKeyConstraint('owner', 'sha256'),
    )
    op.create_table(
        'tokens',
        _needed('id', sa.String(16)),
        _needed('user', sa.String(200)),
        _needed('description', sa.String(200)),
        _needed('scope', sa.String(16)),
        _needed('sha256', sa.String(64)),
        _needed('created_at', _TIME),
        sa.Column('expires_at', _TIME),
        sa.Column('used_at', _TIME),
        sa.Column('revoked_at', _TIME),
        sa.PrimaryKeyConstraint('id'),
    )


def downgrade() -> None:
    """Undo it; what several owners have under one name stands in the way."""
    op.drop_table('tokens')
    op.drop_table('holdings')
    with op.batch_alter_table('datasets') as datasets:
        datasets.drop_constraint('pk_datasets', type_='primary')
        datasets.create_primary_key('pk_datasets', ['name'])
        datasets.drop_column('owner')
        datasets.drop_column('public')
    for name in ('public', 'queue', 'retries', 'max_retries', 'beats'):
        op.drop_column('runs', name)
    with op.batch_alter_table('experiments', table_kwargs=_NUMBERED) as experiments:
        experiments.drop_constraint('uq_experiments_owner_name', type_='unique')
        experiments.create_unique_constraint('uq_experiments_name', ['name'])
        experiments.alter_column('owner', existing_type=sa.String(200), nullable=True)


def _needed(name: str, kind: sa.types.TypeEngine, default: object = None) -> sa.Column:
    return sa.Column(name, kind, nullable=False, server_default=default)  # type: ignore[arg-type]
