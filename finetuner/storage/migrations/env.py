"""Run by Alembic: migrate on the connection, and in the transaction, that `database` opened."""

from alembic import context

from finetuner.storage.database import Base

context.configure(
    connection=context.config.attributes['connection'],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite changes a column by copying the table
)
context.run_migrations()
