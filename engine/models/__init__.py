"""The transformer: configuration, layers, how ranks share them, and the decoder of all families."""
