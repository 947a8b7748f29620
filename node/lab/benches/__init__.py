"""What `dsd bench` measures, one benchmark a file."""
