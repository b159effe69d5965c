"""Alembic's entry point: runs the scripts over the connection that `database.migrate` passes."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
