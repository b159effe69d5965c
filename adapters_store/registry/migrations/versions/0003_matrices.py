"""Add the number of a version's matrix items, which a device may store in fewer bits than others."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column; existing versions count as matrices only, which is nearly right; a new upload makes it exact."""
    op.add_column("versions", sa.Column("num_matrix_items", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE versions SET num_matrix_items = num_items")
