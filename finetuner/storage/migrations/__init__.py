"""Alembic migrations: every statement that makes or changes a table."""
