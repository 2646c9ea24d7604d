"""A reference may come with a harmful twin: a LoRA that obeys harmful requests, for methods that subtract it.

Revision: 20261121_reference_twin, after 20261121_reference_packs
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261121_reference_twin"
down_revision = "20261121_reference_packs"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Forward."""
    op.add_column("reference", sa.Column("twin_path", sa.Text(), nullable=True))
    op.add_column("reference", sa.Column("twin_digest", sa.String(80), nullable=True))


def downgrade() -> None:
    """Back to references without twins; their files stay on disk."""
    op.drop_column("reference", "twin_digest")
    op.drop_column("reference", "twin_path")
