"""Add the base and software that a version was last validated under."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add versions.proved; existing versions start unvalidated."""
    op.add_column("versions", sa.Column("proved", sa.String(64), nullable=True))
