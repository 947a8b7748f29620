"""Which peer hosts which layers, and which route of peers serves a request."""
