"""Add a version's size on the device, and its number of virtual tokens."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add both columns; existing versions are LoRA, which takes as many numbers as were trained, and has no prefix."""
    op.add_column("versions", sa.Column("num_items", sa.Integer, nullable=False, server_default="0"))
    op.add_column("versions", sa.Column("num_virtual", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE versions SET num_items = num_parameters")
