"""Chat models that talk: HTTP endpoints, in-process transformers, and structured replies."""
