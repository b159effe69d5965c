"""Sticky routes, pinned tasks, what was deleted, the registry's own identity; sizes over 32 bits."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """No route was sticky until now, no task pinned, and no deletion kept."""
    op.add_column("routes", sa.Column("sticky", sa.String(10), nullable=True))
    op.add_column("tasks", sa.Column("is_pinned", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_table(
        "removed",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("task_id", sa.Integer, sa.ForeignKey("tasks.id"), nullable=False, index=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.UniqueConstraint("task_id", "digest"),
    )
    op.create_table("identity", sa.Column("id", sa.String(32), primary_key=True))
    with op.batch_alter_table("versions") as versions:
        for name in ("num_parameters", "num_items", "num_matrix_items", "num_bytes"):
            versions.alter_column(name, type_=sa.BigInteger, existing_type=sa.Integer, existing_nullable=False)
