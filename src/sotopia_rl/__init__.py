"""Train language agents to be socially intelligent: SOTOPIA episodes, utterance rewards, RL, evaluation."""

__version__ = "0.1.0"

__all__ = ["__version__"]
