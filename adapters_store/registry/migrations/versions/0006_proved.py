"""Under which base and software a version was proved."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Of what was stored until now nothing is known: it is proved anew."""
    op.add_column("versions", sa.Column("proved", sa.String(64), nullable=True))
