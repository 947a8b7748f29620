"""What a process reports about itself, where the reports go, and the dashboard that shows them."""
