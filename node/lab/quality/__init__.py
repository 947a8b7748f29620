"""Answer quality: prompts, paired generation, thresholds, and a sandbox for generated programs."""
