"""A reference may come with what was measured about its models once: a calibration pack and a basis pack.

Revision: 20261121_reference_packs, after 20261121_reference_patch
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261121_reference_packs"
down_revision = "20261121_reference_patch"
branch_labels = None
depends_on = None

PACKS = ("calibration", "basis")


def upgrade() -> None:
    """Forward."""
    for pack in PACKS:
        op.add_column("reference", sa.Column(f"{pack}_path", sa.Text(), nullable=True))
        op.add_column("reference", sa.Column(f"{pack}_digest", sa.String(80), nullable=True))


def downgrade() -> None:
    """Back to references without packs; their files stay on disk."""
    for pack in reversed(PACKS):
        op.drop_column("reference", f"{pack}_digest")
        op.drop_column("reference", f"{pack}_path")
