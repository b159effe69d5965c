"""How many of a version's numbers are of matrices, which a device may keep in fewer bits than the others."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """What was stored until now counts as matrices, which most of it is: an adapter that is uploaded again is exact."""
    op.add_column("versions", sa.Column("num_matrix_items", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE versions SET num_matrix_items = num_items")
