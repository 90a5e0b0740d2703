"""Collections of image/label pairs, and the words by which they are found."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = '0004'
down_revision: str | None = '0003'
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), 'sqlite')
_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        'collections',
        sa.Column('id', _NUMBER, primary_key=True),
        _needed('key', sa.String(32)),
        _needed('owner', sa.String(200)),
        _needed('name', sa.String(200)),
        _needed('description', sa.Text()),
        _needed('words', sa.Text()),
        _needed('mltype', sa.String(32)),
        _needed('classes', sa.JSON()),
        _needed('has_fixed_classes', sa.Boolean()),
        sa.Column('partition', sa.JSON()),
        _needed('shape', sa.JSON()),
        _needed('dtype', sa.String(16)),
        _needed('sensors', sa.JSON()),
        _needed('source', sa.String(32)),
        *(sa.Column(side, sa.Float()) for side in ('west', 'south', 'east', 'north')),
        _needed('public', sa.Boolean()),
        _needed('revision', sa.BigInteger()),
        _needed('created_at', _TIME),
        _needed('updated_at', _TIME),
        sa.UniqueConstraint('owner', 'name'),
        sa.UniqueConstraint('key'),
        sqlite_autoincrement=True,
    )
    op.create_table(
        'collection_pairs',
        sa.Column('id', _NUMBER, primary_key=True),
        _needed('collection_id', _NUMBER),
        _needed('group_name', sa.String(200)),
        _needed('pack', sa.String(40)),
        _needed('offset', sa.BigInteger()),
        _needed('num_bytes', sa.BigInteger()),
        _needed('checksum', sa.BigInteger()),
        _needed('encoding', sa.String(16)),
        _needed('label', sa.LargeBinary()),
        sa.Column('transform', sa.JSON()),
        sa.Column('crs', sa.Text()),
        _needed('updated_at', _TIME),
        sa.ForeignKeyConstraint(['collection_id'], ['collections.id'], ondelete='CASCADE'),
        sqlite_autoincrement=True,
    )
    op.create_index(
        'ix_collection_pairs_collection_id_id', 'collection_pairs', ['collection_id', 'id']
    )
    op.create_index(
        'ix_collection_pairs_collection_id_group_name_id',
        'collection_pairs',
        ['collection_id', 'group_name', 'id'],
    )
    if op.get_bind().dialect.name == 'sqlite':
        words = "fts5(words, tokenize='porter unicode61')"
        op.execute(f'CREATE VIRTUAL TABLE collection_words USING {words}')
    else:
        vector = sa.text("to_tsvector('english'::regconfig, words)")
        op.create_index('ix_collections_words', 'collections', [vector], postgresql_using='gin')


def downgrade() -> None:
    """Undo it."""
    if op.get_bind().dialect.name == 'sqlite':
        op.execute('DROP TABLE collection_words')
    op.drop_table('collection_pairs')
    op.drop_table('collections')


def _needed(name: str, kind: sa.types.TypeEngine) -> sa.Column:
    return sa.Column(name, kind, nullable=False)
