"""Sets up a coordinator for the commands: model, tokenizer, drafter, policy and a connected engine."""
