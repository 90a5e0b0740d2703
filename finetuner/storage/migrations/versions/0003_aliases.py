"""Names for artifacts, and an index that finds the newest finished run of an experiment."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = '0003'
down_revision: str | None = '0002'
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_LATEST = 'ix_runs_experiment_id_status_finished_at'


def upgrade() -> None:
    """Make the table and the indexes."""
    op.create_table(
        'aliases',
        sa.Column('owner', sa.String(200), nullable=False),
        sa.Column('name', sa.String(200), nullable=False),
        sa.Column('label', sa.String(200), nullable=False),
        sa.Column('artifact_id', sa.String(24), nullable=False),
        sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint('owner', 'name', 'label'),
    )
    op.create_index('ix_aliases_artifact_id', 'aliases', ['artifact_id'])
    op.create_index(_LATEST, 'runs', ['experiment_id', 'status', 'finished_at'])


def downgrade() -> None:
    """Undo it."""
    op.drop_index(_LATEST, 'runs')
    op.drop_table('aliases')
