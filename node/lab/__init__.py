"""Everything that measures or trains. Nothing that serves imports it."""
