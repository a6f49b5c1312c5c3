"""The parts of `gpu_check.py`: checks and measurements that need a GPU."""
