"""Add the tokens that a version was trained to end its answers with."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add versions.ends; existing versions have none of their own."""
    op.add_column("versions", sa.Column("ends", sa.JSON, nullable=False, server_default="[]"))
