"""How the target picks a token, and which candidates that accepts."""
