"""alembic's entry: it runs the scripts over the connection that `registry.migrate` gives."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
