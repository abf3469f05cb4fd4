"""Learning-rate path switching for LLM version updates; importing this package imports no torch and no deepspeed."""

__version__ = "0.1.0"
