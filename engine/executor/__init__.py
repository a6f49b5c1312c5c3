"""A loaded model runs steps: the runner and its executors, their memory, and the ranks' processes."""
