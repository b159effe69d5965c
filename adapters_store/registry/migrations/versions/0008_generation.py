"""Add the sampling that a version's answers have if a request names none."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add versions.generation; existing versions have the routes' defaults."""
    op.add_column("versions", sa.Column("generation", sa.JSON, nullable=True))
