"""What the ranks of an engine exchange within a step."""
