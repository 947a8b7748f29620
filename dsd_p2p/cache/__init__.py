"""Which cache slot holds which node: shared by stages, drafters and audits."""
