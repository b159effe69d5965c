"""Add the server that may write."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add identity.server; the next server that opens the database sets it."""
    op.add_column("identity", sa.Column("server", sa.String(32), nullable=True))
