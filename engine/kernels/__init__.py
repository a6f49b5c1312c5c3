"""One file an operation: the public function that picks a body by device, and its reference."""
