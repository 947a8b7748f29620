"""The APIs beside OpenAI's chat: each turns its requests into `ChatRequest`, and answers into its own words."""
