"""Everything that measures, simulates or trains. No code that serves imports it."""
