"""Models on disk: where they are, their configuration, weights and tokenizers."""
