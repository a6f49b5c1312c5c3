"""From text to requests and back, on both sides of the process border."""
