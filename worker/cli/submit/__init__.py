"""Commands that submit jobs, list submissions and collect results."""
