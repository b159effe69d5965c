"""Add the time of the last usage."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add usage.last, in Unix seconds; of what was used before it is the time of this migration."""
    op.add_column("usage", sa.Column("last", sa.Float, nullable=False, server_default="0"))
    op.execute(sa.text("UPDATE usage SET last = :now").bindparams(now=time.time()))
