"""What a version takes on the device, and its virtual tokens."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Until now there was LoRA alone: on the device it takes the numbers that were trained, and it has no prefix."""
    op.add_column("versions", sa.Column("num_items", sa.Integer, nullable=False, server_default="0"))
    op.add_column("versions", sa.Column("num_virtual", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE versions SET num_items = num_parameters")
