"""A coordinator for the commands: model, text, drafter, policy and a connected engine."""
