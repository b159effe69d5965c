"""Add the texts around a version's calls of tools, and around its reasoning."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Add versions.tools and versions.reasoning; existing versions have neither."""
    for name in ("tools", "reasoning"):
        op.add_column("versions", sa.Column(name, sa.JSON, nullable=True))
