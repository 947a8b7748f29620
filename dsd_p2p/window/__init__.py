"""How much to speculate, decided from measurements."""
