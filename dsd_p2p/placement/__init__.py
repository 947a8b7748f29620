"""Which peer hosts which layers, and which chain of peers serves a request."""
