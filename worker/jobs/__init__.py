"""Jobs: deliveries, attempts and outcomes."""
