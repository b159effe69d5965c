"""Add sticky routes, pinned tasks, deleted versions and the registry's own identity; widen sizes to 64 bits."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add columns and tables; existing routes are not sticky, existing tasks not pinned, past deletions unknown."""
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
