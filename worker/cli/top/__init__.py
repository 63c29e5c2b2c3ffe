"""`vqa-worker top`: a running fleet, by the broker's figures and the workers' own."""
