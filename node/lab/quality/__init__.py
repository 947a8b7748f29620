"""Tools to judge answer quality: prompts, paired generation, thresholds, and a sandbox for generated programs."""
