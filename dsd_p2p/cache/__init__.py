"""Says which slot of a KV cache holds which node, for stages, drafters and audits."""
