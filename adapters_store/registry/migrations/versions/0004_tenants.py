"""Add tenants, their keys and limits, and the log of changes."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Create the tables with a row for the only tenant so far; widen usage counts to 64 bits."""
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("deleted", sa.Float, nullable=True),
    )
    op.execute("INSERT INTO tenants (name, limits, created) VALUES ('default', '{}', 0)")
    op.create_table(
        "keys",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.name"), nullable=False, index=True),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("note", sa.String(200), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("actor", sa.String(63), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False, index=True),
        sa.Column("action", sa.String(40), nullable=False),
        sa.Column("what", sa.JSON, nullable=False),
        sa.Column("request_id", sa.String(64), nullable=True),
    )
    with op.batch_alter_table("usage") as usage:
        for name in ("requests", "prompt_tokens", "completion_tokens"):
            usage.alter_column(name, type_=sa.BigInteger, existing_type=sa.Integer, existing_nullable=False)
