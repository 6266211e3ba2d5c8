"""Servers: vLLM for a base with adapters (`vllm.py`), and best-of-N over any policy (`best_of_n.py`)."""
