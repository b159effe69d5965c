"""Add the form that a version's answers have if a request names none."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Add versions.form; existing versions answer in free text."""
    op.add_column("versions", sa.Column("form", sa.JSON, nullable=True))
