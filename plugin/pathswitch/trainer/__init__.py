"""The embedded default: a small LLaMA on DeepSpeed, one job per path, resumable to the bit."""
