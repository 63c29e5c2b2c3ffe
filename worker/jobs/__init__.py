"""Jobs: deliveries, attempts, outcomes and how they are settled."""
